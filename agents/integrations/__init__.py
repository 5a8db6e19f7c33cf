"""Adapters that put the controller into the training loops of frameworks, one file each."""
