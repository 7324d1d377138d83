"""The conditioned MLP's Triton kernels: forward, backward, and sums of the weights' gradients."""
