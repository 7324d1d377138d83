"""What the representation is worth: k-NN, linear probes, equivariance."""
