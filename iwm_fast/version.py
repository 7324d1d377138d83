"""The version of the package, which setup.py reads from this file's text."""

__all__ = ["__version__"]

__version__ = "0.1.0"
