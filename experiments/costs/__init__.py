"""Measure what a token costs in seconds and joules by batch size, precision and sparsity."""
