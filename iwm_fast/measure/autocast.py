"""CUDA's autocast to bf16 for the meta device, which has none.

It covers only the operators of a vision transformer in plain PyTorch, by the lists in torch's documentation ("CUDA Ops
that can autocast"): matmuls run in bf16, normalisations, softmax and losses in fp32, all others in their input's
dtype. A weight is rounded once and its copy cached until the pass ends, as in autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["CudaAutocast"]

_HALF = {F.linear, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_FULL = {F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.smooth_l1_loss}


class CudaAutocast(TorchFunctionMode):
    """Cast the arguments of operators called inside."""

    def __init__(self) -> None:
        super().__init__()
        self._rounded: dict[nn.Parameter, Tensor] = {}

    def _round(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.bfloat16()
        if value not in self._rounded:
            self._rounded[value] = value.bfloat16()
        return self._rounded[value]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: tuple[tuple[Any, ...], dict[str, Any]] = (args, dict(kwargs or {}))
        if func in _HALF:
            given = tree_map(self._round, given)
        elif func in _FULL:
            given = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x, given)
        return func(*given[0], **given[1])
