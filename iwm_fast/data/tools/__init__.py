"""What the data commands run, and training does not."""
