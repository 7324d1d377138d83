"""Baselines of the kernels, the views and the step."""
