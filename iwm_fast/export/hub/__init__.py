"""Code files that exports carry with them: each is read by another library, and this package never imports it."""
