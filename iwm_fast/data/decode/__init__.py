"""Decoding: from a file's bytes to upright 8-bit pixels."""
