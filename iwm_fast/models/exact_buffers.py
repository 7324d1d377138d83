"""Constants of formulas that a cast of the model does not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["ExactBuffers"]


class ExactBuffers(nn.Module):
    """A module whose own fp32 buffers stay fp32 where it is cast to half: a cast back could not restore them."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ExactBuffers:
        exact = {name: own for name, own in self._buffers.items() if own is not None and own.dtype.itemsize >= 4}
        super()._apply(fn, recurse)
        for name, own in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype.itemsize < 4:
                self._buffers[name] = own.to(moved.device, torch.float32)
        return self
