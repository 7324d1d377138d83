"""The ranks of a training: how they connect, watch and wait for each other."""
