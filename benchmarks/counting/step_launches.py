"""Count the launches of a training step by part, without a GPU.

The step is the training loop's own (`engine.step.Trainer`), on one rank. Model, loss and their backward pass run on
meta tensors of the configuration's sizes. DeepSpeed, the optimizer and the EMA really run, on the CPU, over weights of
those sizes with zero gradients, which needs 16 bytes per trained parameter and more. Their launches follow from the
operators that they dispatch there, with the chunk sizes of CUDA's multi-tensor kernels (`launch_rules`); Triton's
kernels are recorded.

Attention counts as the FlashAttention that xformers calls in half precision, with the launches that the null GPU
counts. Copies and collectives do not count. A cuBLAS call counts as one launch of PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from iwm_fast.actions.external import space_of
from iwm_fast.benchmarks.counting.launch_counting import Launches, counting
from iwm_fast.benchmarks.counting.launch_parts import Parts, Surrogate
from iwm_fast.config import Config
from iwm_fast.data.loader import TrainingStream
from iwm_fast.engine.bf16 import Bf16Compute
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.ema import TargetAverage
from iwm_fast.engine.schedules import Schedules
from iwm_fast.engine.step import Trainer
from iwm_fast.engine.zero import ZeroEngine, initialize
from iwm_fast.errors import UserError
from iwm_fast.kernels import use_backend
from iwm_fast.measure.batches import described
from iwm_fast.measure.harness import MANY_STEPS
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.models.attention import use_library
from iwm_fast.models.iwm import IWM

__all__ = ["PartLaunches", "step_launches"]

# Kernels per call: forward; backward, which also zeroes its random state.
_ATTENTION, _ATTENTION_BACKWARD = 1, 4
_ATTENTIONS = ("auto", "xformers", "efficient")
_META = torch.device("meta")


@dataclass(frozen=True)
class PartLaunches:
    """Launches of one part of a step: of Triton's kernels, and of PyTorch's and its libraries'."""

    part: str
    triton: int
    torch: int


def step_launches(config: Config, *, optimizer: bool = True) -> list[PartLaunches]:
    """Count a step's launches by part, in the order of each part's first launch.

    ``optimizer``: include DeepSpeed, the optimizer and the EMA, which needs a process group of one rank; without, count
    the model alone, which allocates nothing. Raise UserError for configurations that cannot be counted.
    """
    _require_counted(config)
    quiet, _ = described(config, None)
    quiet = quiet.model_copy(update={"log": config.log.model_copy(update={"every_steps": MANY_STEPS})})
    trainer, parts = _trainer(quiet, optimizer)
    launches = Launches(parts.part_of)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, _Attention.apply(launches, q, k, v))

    with use_library(attend), use_backend("triton"), counting(launches):
        trainer.train_step()
    names = dict.fromkeys((*launches.torch, *launches.triton))
    return [PartLaunches(name, launches.triton[name], launches.torch[name]) for name in sorted(names, key=_order)]


def _order(part: str) -> tuple[int, str]:
    spans = ("step", "data", "forward", "backward", "optimizer", "ema")
    return spans.index(part.split("/", maxsplit=1)[0]), part


def _require_counted(config: Config) -> None:
    """Raise UserError if a step launches what cannot be counted here."""
    attention = config.model.attention
    for found, instead in (
        (config.zero.stage == 3 and "zero.stage=3", "zero.stage=0, 1 or 2: gathers of layers are not counted"),
        (config.train.compile and "train.compile=true", "train.compile=false: compiled code is not counted"),
        (
            attention not in _ATTENTIONS and f"model.attention={attention}",
            "model.attention=auto: others are not counted",
        ),
        (config.train.deterministic and "train.deterministic=true", "train.deterministic=false: its operators differ"),
    ):
        if found:
            raise UserError(f"{found}: set {instead}")


def _trainer(config: Config, optimizer: bool) -> tuple[Trainer, Parts]:
    space = space_of(config.actions)
    model = _without_memory(config, space.dim)
    network: nn.Module = model
    if config.train.precision == "bf16":
        network = Bf16Compute(model) if config.zero.stage == 0 else model.bfloat16()
    parts = Parts(network)
    ranks = Ranks(0, 1, 0, 1, _META)
    stream = synthetic_stream(config, space, _META, steps=1)
    zero = _real(config, space.dim, stream.micro_batch, stream.accumulation) if optimizer else None
    engine = _Engine(network, zero, parts)
    average = TargetAverage(zero, ranks) if zero is not None and config.model.target == "ema" else None
    schedules = Schedules(config.train, MANY_STEPS)
    trainer = Trainer(
        config, cast(ZeroEngine, engine), average, cast(TrainingStream, stream), schedules, ranks,
        predicts=model.predicts, action_dim=space.dim, dataset_size=MANY_STEPS, step=1, updates=1,
    )  # fmt: skip
    trainer.new_spans = lambda: parts
    return trainer, parts


def _without_memory(config: Config, actions: int) -> IWM:
    with _META:
        return IWM(config.model, actions, activation_checkpointing=config.train.activation_checkpointing)


def _real(config: Config, actions: int, micro_batch: int, accumulation: int) -> ZeroEngine:
    """DeepSpeed's engine over the model's weights, all zero, on the CPU."""
    model = _without_memory(config, actions).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return initialize(model, config, micro_batch, accumulation)


class _Engine:
    """Stands in for `ZeroEngine` and DeepSpeed's engine: runs the model on meta tensors, then DeepSpeed's own work.

    Everything else that the loop reads from a `ZeroEngine` comes from the real one.
    """

    def __init__(self, network: nn.Module, zero: ZeroEngine | None, parts: Parts) -> None:
        self.engine = self
        self.network, self.zero, self.parts = network, zero, parts
        self.optimizer: Any = zero.optimizer if zero is not None else _NoOptimizer()
        if zero is not None:
            trained = [p for p in zero.module.parameters() if p.requires_grad]
            zero.engine.module.forward = lambda: Surrogate.apply(*trained)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.zero if self.zero is not None else _NoOptimizer, name)

    def __call__(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Differentiate the model, then give DeepSpeed gradients of the same shapes."""
        loss.backward()
        if self.zero is not None:
            with self.parts.real():
                self.zero.engine.backward(self.zero.engine(), **options)
            self._let_go(self.zero)

    def step(self) -> None:
        """Run DeepSpeed's step; at the end of a global batch, the optimizer's."""
        if self.zero is not None:
            self.zero.engine.step()
            self._let_go(self.zero)

    def _let_go(self, zero: ZeroEngine) -> None:
        """Drop the gradients that DeepSpeed has copied from the real model; the next would be added to them."""
        for parameter, real in zip(self.network.parameters(), zero.module.parameters(), strict=True):
            if real.grad is None:
                parameter.grad = None


class _NoOptimizer:
    """Answers the loop where no optimizer step is counted."""

    param_groups: Iterable[dict[str, Any]] = ()
    found_inf = torch.zeros(())


class _Attention(torch.autograd.Function):
    """Counts the launches of xformers' operator; the tensors are on the meta device."""

    @staticmethod
    def forward(ctx: Any, launches: Launches, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return a tensor like v."""
        ctx.launches, ctx.like = launches, (q, k, v)
        launches.add_torch("attention", _ATTENTION)
        return torch.empty(v.shape, dtype=v.dtype, device=v.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return tensors like q, k and v."""
        ctx.launches.add_torch("attention", _ATTENTION_BACKWARD)
        return (None, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in ctx.like))
