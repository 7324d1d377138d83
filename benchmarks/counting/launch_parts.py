"""Attribute a launch to a part of the training step, by the loop's spans and the model's modules."""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_right
from collections.abc import Iterator
from types import FrameType
from typing import cast

import torch
from torch import nn
from torch.autograd.graph import Node

from iwm_fast.engine.bf16 import Bf16Compute
from iwm_fast.engine.step import Spans
from iwm_fast.models.attention import Attention
from iwm_fast.models.blocks import Block, ConditionedMlp, Norm, StreamNorm
from iwm_fast.models.iwm import IWM
from iwm_fast.models.predictors import FeatureMixer
from iwm_fast.models.vit import PatchEmbedding, VisionTransformer

__all__ = ["Parts", "Surrogate"]

_COMPONENTS = {"encoder": "context encoder", "target_encoder": "target encoder", "predictor": "predictor"}
_EMBEDDING, _LOSS, _REST, _TARGET = "patch embedding", "loss", "rest", "target encoder/rest"
_KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((ConditionedMlp, FeatureMixer), "mlp"),
    (Attention, "attention"),
    ((Norm, StreamNorm), "norms"),
    ((Block, VisionTransformer), _REST),
)
# Words in function names of the optimizer's step, searched from the innermost frame.
_WORDS = (
    ("finite check", ("overflow", "finite", "inf_or_nan", "nan_or_inf", "invalid")),
    ("gradient norm", ("norm", "clip")),
    ("AdamW", ("adam", "lamb", "move")),
)
_COMPARISONS = ("lt", "isfinite", "isinf", "isnan")
_OPTIMIZERS = ("torch/optim/", "engine/optimizer.py")


class Surrogate(torch.autograd.Function):
    """A loss of parameters with zero gradients: replaces the model where only the parameters' shapes matter."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *parameters: torch.Tensor) -> torch.Tensor:
        """Return 0."""
        ctx.save_for_backward(*parameters)
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return zeros for each."""
        return tuple(torch.zeros_like(p) for p in ctx.saved_tensors)  # type: ignore[attr-defined]


class Parts(Spans):
    """The loop's spans, which also know the current part.

    In the forward pass, the part is the innermost watched module's. In the backward pass, it is that of the module
    that made the running graph node, or of the module that is being recomputed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._span = "step"
        self._within: list[str] = []
        self._real = False  # whether DeepSpeed runs, with a surrogate of the model
        self._numbers, self._made = [-1], [_REST]  # graph nodes from this number on belong to this part
        for module in model.modules():
            if isinstance(module, Bf16Compute):
                self._watch(module, "forward", "bf16 weights")
            if isinstance(module, IWM):
                self._watch(module, "forward", _REST)
                self._watch(module.objective, "values", _LOSS)
                self._watch_components(module)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Attribute launches inside to this part of the loop."""
        before, self._span = self._span, name
        try:
            with super().__call__(name):
                yield
        finally:
            self._span = before

    @contextlib.contextmanager
    def real(self) -> Iterator[None]:
        """Inside, DeepSpeed runs for its own launches only: the surrogate's do not count."""
        self._real = True
        try:
            yield
        finally:
            self._real = False

    def part_of(self, operator: str) -> str | None:
        """Return the part of what an operator or kernel of that name launches now; None: not counted."""
        if self._span == "optimizer":
            return f"optimizer/{_optimizer_part(operator, sys._getframe(1))}"  # noqa: SLF001  (inspect reads files)
        if self._real:
            return f"{self._span}/DeepSpeed" if _in_deepspeed(sys._getframe(1)) else None  # noqa: SLF001
        if self._span not in ("forward", "backward"):
            return self._span
        return f"{self._span}/{self._module_part()}"

    def _module_part(self) -> str:
        if self._within:
            return self._within[-1]
        node = cast(Node | None, torch._C._current_autograd_node())  # noqa: SLF001  (has no public name)
        if node is None:
            return _LOSS if self._span == "backward" else _REST  # the loss's own gradient
        if node.name().endswith("AccumulateGrad"):
            return "gradients"
        return self._made[bisect_right(self._numbers, node._sequence_nr()) - 1]  # noqa: SLF001  (as above)

    def _watch_components(self, model: IWM) -> None:
        self._watch(model, "_encode_target", _TARGET)
        for name, component in _COMPONENTS.items():
            network = getattr(model, name)
            if network is None:
                continue
            self._watch(network, "forward", f"{component}/{_REST}")
            if isinstance(network, VisionTransformer):
                self._watch(network, "embed", _EMBEDDING)
            for module in network.modules():
                kind = next((kind for types, kind in _KINDS if isinstance(module, types)), None)
                if kind is not None:
                    self._watch(module, "forward", f"{component}/{kind}")
                if isinstance(module, Attention):
                    for linear in (module.qkv, module.proj):  # the block calls these, not the attention module
                        self._watch(linear, "forward", f"{component}/{kind}")
                if isinstance(module, PatchEmbedding):
                    self._watch(module, "forward", _EMBEDDING)

    def _watch(self, owner: object, method: str, part: str) -> None:
        watched = getattr(owner, method)

        def inside(*args: object, **kwargs: object) -> object:
            # If encoder and target share weights, the pass inside `_encode_target` is the target's.
            shared = part.startswith("context encoder") and _TARGET in self._within
            self._within.append(part.replace("context", "target") if shared else part)
            self._mark()
            try:
                return watched(*args, **kwargs)
            finally:
                self._within.pop()
                self._mark()

        setattr(owner, method, inside)

    def _mark(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())  # noqa: SLF001  (has no public name)
        self._made.append(self._within[-1] if self._within else _REST)


def _frames(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """Yield file and function of each caller, innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def _in_deepspeed(frame: FrameType) -> bool:
    """Return whether DeepSpeed's own code made this call, not the surrogate or autograd."""
    for file, function in _frames(frame):
        if file == __file__ and function in ("forward", "backward"):
            return False
        if function in ("_engine_run_backward", "_make_grads"):  # the loss's gradient counts with the model's
            return False
        if "/deepspeed/" in file:
            return True
    return False


def _optimizer_part(operator: str, frame: FrameType) -> str:
    """Return the part within the optimizer's step, by the operator's name and the calling functions."""
    if operator in _COMPARISONS:
        return "finite check"
    deepspeed = False
    for file, function in (("", operator), *_frames(frame)):
        for part, words in _WORDS:
            if any(word in function.lower() for word in words):
                return part
        if file.endswith("engine/step.py"):
            break
        if any(place in file for place in _OPTIMIZERS):
            return "AdamW"
        deepspeed = deepspeed or "/deepspeed/" in file
    return "DeepSpeed" if deepspeed else _REST
