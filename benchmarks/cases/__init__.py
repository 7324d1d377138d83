"""What is measured, by name: sizes of kernels, and configurations of the step."""
