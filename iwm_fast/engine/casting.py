"""bf16 compute from fp32 weights, for the stage at which DeepSpeed keeps the weights as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

__all__ = ["Bf16Compute"]


class Bf16Compute(nn.Module):
    """Runs ``model`` with its parameters rounded to bf16 at each call; gradients arrive at the fp32 parameters.

    The arithmetic is that of a model whose weights are bf16 copies of fp32 master weights, as at ZeRO stages 1 to 3.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model`` returns for the same arguments."""
        rounded = {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}
        return functional_call(self.model, rounded, args, kwargs)
