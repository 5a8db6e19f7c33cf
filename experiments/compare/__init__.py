"""Compare methods on cases with tuned baselines (`trainpilot compare`); each run is stored as a file of its own."""
