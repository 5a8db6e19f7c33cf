"""Turn finished runs into figures: compute multipliers, intervals and fronts, as docs/measuring.md explains them."""
