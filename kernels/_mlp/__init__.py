"""The conditioned MLP on Triton's kernels: forward, backward, and the sums of the weights' gradients."""
