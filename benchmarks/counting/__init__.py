"""What is counted without a GPU: launches of kernels, and what a forward pass keeps."""
