"""Compile the parts of the networks that do not depend on lengths: before and after each attention, and both ends.

A region takes and returns tensors only. Their first dimension, tokens or images, is marked dynamic and every other is
constant, so new lengths run the existing code. Attention, which depends on lengths, stays outside. A module's
parameters are inputs of its region: all blocks of one shape share code at any depth. Nothing is wrapped, so parameters
keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from iwm_fast.models.blocks import Block
from iwm_fast.models.iwm import IWM
from iwm_fast.models.predictors import MlpPredictor, VitPredictor
from iwm_fast.models.vit import VisionTransformer

__all__ = ["compilations", "compile_regions"]


def compile_regions(model: IWM) -> None:
    """Compile the model's regions when each first runs, which takes seconds to minutes per launch.

    Results are those of the same operators with other rounding. torch caches code on disk for the next launch.
    """
    # A method holds its compiled code, and torch allows eight versions: those of another configuration are dropped.
    torch.compiler.reset()
    for module, name, packed in _regions(model):
        setattr(module, name, MethodType(_region(type(module), name, packed), module))  # a copy's is bound to the copy


def compilations() -> int:
    """Return the number of graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _regions(model: IWM) -> Iterator[tuple[nn.Module, str, tuple[int, ...]]]:
    """(module, method name, which arguments hold packed tokens or images) of each region."""
    for module in model.modules():
        if isinstance(module, Block):
            yield module, "before", (0,)
            yield module, "after", (0, 4)
        elif isinstance(module, VisionTransformer):
            yield module, "embed", (0, 1)
        elif isinstance(module, VitPredictor | MlpPredictor):
            yield module, "finish", (0,)
    if isinstance(model.predictor, MlpPredictor):  # a `ConditionedMlp` in a block is part of the block's region
        yield from ((block, "forward", (0,)) for block in model.predictor.blocks)


@cache
def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic=True would also make the widths dynamic wherever a weight is no Parameter, as under `Bf16Compute`.
    return torch.compile(method, fullgraph=True, dynamic=False)


def _region(kind: type[nn.Module], name: str, packed: tuple[int, ...]) -> Callable[..., Any]:
    method = getattr(kind, name)
    compiled = _compiled(method)

    @wraps(method)  # a file of a whole model names the method, and is read as a model that is not compiled
    def run(module: nn.Module, *arguments: Tensor | None) -> Any:
        for tensor in arguments:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # noqa: SLF001  (the documented name)
        # torch specialises on dimensions of 0 and 1 in any case; such small inputs are not worth a compilation.
        few = any(
            len(tensor) < 2 for tensor in (arguments[i] for i in packed if i < len(arguments)) if tensor is not None
        )
        return (method if few else compiled)(module, *arguments)

    return run
