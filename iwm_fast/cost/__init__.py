"""What a run costs, worked out before it starts, and what it was run on."""
