"""Simulated training runs: physics fitted to real loss curves, thousands of runs at once."""
