"""The ranks of a training: how they find, watch and wait for each other."""
