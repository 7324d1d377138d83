"""Checkpoints: format, files, writing, finding and reading."""
