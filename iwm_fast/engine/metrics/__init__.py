"""Metrics of a running training, and where they go."""
