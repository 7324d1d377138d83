"""Training steps to compare: each module takes one project's own parts through one step on the batches it is given."""
