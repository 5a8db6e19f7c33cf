"""Simulate thousands of training runs at once, with physics fitted to real loss curves."""
