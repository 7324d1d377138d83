"""Named benchmark cases: sizes of kernels, and configurations of the step."""
