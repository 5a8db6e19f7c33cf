"""A part of the fake Zeus."""
