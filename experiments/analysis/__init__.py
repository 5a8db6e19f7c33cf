"""Compute figures from finished runs: compute multipliers, intervals and fronts (explained in docs/measuring.md)."""
