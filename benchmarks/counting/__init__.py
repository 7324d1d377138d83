"""Counts that need no GPU: kernel launches, and saved activations."""
