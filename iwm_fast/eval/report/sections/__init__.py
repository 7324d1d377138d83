"""The sections of the evaluations whose figures need more than a table."""
