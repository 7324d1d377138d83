"""Which implementation and which block sizes a matrix multiply uses."""
