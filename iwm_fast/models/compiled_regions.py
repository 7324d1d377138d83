"""The networks' parts that know no lengths, as compiled code: what lies before and after an attention, and both ends.

A region takes and gives tensors only. Their first dimension, which counts tokens or images, is marked dynamic and
every other is a constant, so a batch of other lengths runs the code that is there. The attention between the regions,
which is divided by lengths, stays outside. A module's parameters are inputs to its region: all blocks of one shape
share its code, whatever the depth. Nothing is wrapped, so parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from iwm_fast.models.blocks import Block
from iwm_fast.models.iwm import IWM
from iwm_fast.models.predictors import MlpPredictor, VitPredictor
from iwm_fast.models.vit import VisionTransformer

__all__ = ["compilations", "compile_regions"]


def compile_regions(model: IWM) -> None:
    """Let the model's regions run as compiled code, made when each first runs: seconds to minutes, once a start.

    The answers are those of the same operators, rounded in other places. torch keeps code on disk for the next start.
    """
    # Code belongs to a method, and torch allows eight kinds of it: those of another configuration are let go.
    torch.compiler.reset()
    for module, name, packed in _regions(model):
        setattr(module, name, _region(module, name, packed))


def compilations() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _regions(model: IWM) -> Iterator[tuple[nn.Module, str, tuple[int, ...]]]:
    """Each region: a module, the name of its method, and which of the arguments are packed tokens'."""
    for module in model.modules():
        if isinstance(module, Block):
            yield module, "before", (0,)
            yield module, "after", (0, 4)
        elif isinstance(module, VisionTransformer):
            yield module, "embed", (1,)
        elif isinstance(module, VitPredictor | MlpPredictor):
            yield module, "finish", (0,)
    if isinstance(model.predictor, MlpPredictor):  # another's `ConditionedMlp` is a part of its block's region
        yield from ((block, "forward", (0,)) for block in model.predictor.blocks)


@cache
def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic=True would make the widths variable too wherever a weight is no Parameter, as under `Bf16Compute`.
    return torch.compile(method, fullgraph=True, dynamic=False)


def _region(module: nn.Module, name: str, packed: tuple[int, ...]) -> Callable[..., Any]:
    method = getattr(type(module), name)
    compiled = _compiled(method)

    def run(*arguments: Tensor | None) -> Any:
        for tensor in arguments:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # noqa: SLF001  (the documented name)
        # torch makes code of its own for dimensions of 0 and of 1, whatever is asked: not for as little work as that.
        few = any(
            len(tensor) < 2 for tensor in (arguments[i] for i in packed if i < len(arguments)) if tensor is not None
        )
        return (method if few else compiled)(module, *arguments)

    return run
