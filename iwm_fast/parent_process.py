"""The process and its parent, as they were when the package was first imported.

The package imports this module before anything else: during the long imports a launcher may already end.
"""

from __future__ import annotations

import os

__all__ = ["BORN"]

BORN = (os.getpid(), os.getppid())
