"""Show the figures: one HTML page, CSV, JSON, TensorBoard."""
