"""The process and its parent at the first import of the package.

The package imports this module first: the launcher may exit during the long imports.
"""

from __future__ import annotations

import os

__all__ = ["BORN"]

BORN = (os.getpid(), os.getppid())
