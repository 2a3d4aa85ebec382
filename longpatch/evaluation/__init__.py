"""Measures of how well a model reads and remembers."""
