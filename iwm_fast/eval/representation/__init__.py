"""Evaluations of the representation: k-NN, linear probes, equivariance."""
