"""Sections of evaluations that need more than a table."""
