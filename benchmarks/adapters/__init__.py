"""Training steps to compare: each module runs one project's step, from its own parts, on given batches."""
