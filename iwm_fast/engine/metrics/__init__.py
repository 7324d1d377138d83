"""Metrics of a running training, and their loggers."""
