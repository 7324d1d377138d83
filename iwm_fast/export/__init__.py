"""Export a run to other formats."""
