"""Where a training step's time, operations and memory go: parts, modules, operators, a trace and a picture."""

from __future__ import annotations

from iwm_fast.measure.profile.profile import ncu_command, profile

__all__ = ["ncu_command", "profile"]
