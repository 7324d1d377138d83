"""iwm-fast: a training engine for Image World Models (arXiv:2403.00504)."""

__all__ = ["__version__"]

__version__ = "0.1.0"
