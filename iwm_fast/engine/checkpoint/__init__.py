"""A checkpoint: its format, its files, how it is written, found and read."""
