"""Run every method on every case, with tuned baselines beside them; keep each run as its own file."""
