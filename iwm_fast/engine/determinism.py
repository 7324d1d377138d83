"""`train.deterministic`: GPU operators whose results do not change between runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from iwm_fast.config import Config
from iwm_fast.errors import UserError

__all__ = ["deterministic_operators", "require_deterministic"]

# cuBLAS is deterministic only with a workspace of fixed size, which it reads at its first use.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Values of model.attention whose backward pass cannot be deterministic.
_NEVER = ("cudnn",)


def require_deterministic(config: Config) -> None:
    """Raise UserError where the configuration asks for determinism and for an operator without it."""
    if config.train.deterministic and config.model.attention in _NEVER:
        raise UserError(
            f"train.deterministic is true, and the backward pass of model.attention={config.model.attention} is not "
            "deterministic: use auto, xformers, sdpa or varlen"
        )


@contextmanager
def deterministic_operators(config: Config, device: torch.device) -> Iterator[None]:
    """Apply `train.deterministic` within the block. A CPU needs nothing: its operators are deterministic.

    An operator without a deterministic form raises RuntimeError, by name.
    """
    if not config.train.deterministic or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    os.environ.setdefault(*_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it would fill all allocated memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
