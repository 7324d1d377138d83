"""The one exception that means "the user can mend this": the command line prints it as a single line and exits with
2.
"""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """A mistake or a circumstance that the user can mend: one line that says what, where and what to do."""
