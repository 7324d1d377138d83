"""What the kernels, the views and the step are compared with."""
