"""Run iwm-fast's own step: the engine's loop with DeepSpeed, optimizer, finite check and EMA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks.adapters.inputs import Inputs, Shape, fingerprint
from iwm_fast.config import Config
from iwm_fast.cost.flops import step_flops
from iwm_fast.cost.tokens import Rounding, rounding_of
from iwm_fast.data.batch import Batch
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.measure.flop_count import counted_flops
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.synthetic import BatchStream
from iwm_fast.models import IWM
from iwm_fast.models.packing import pack
from iwm_fast.version import __version__

__all__ = ["Ours", "forward_backward", "operations", "padded_operations", "padding_difference"]


class Ours:
    """The step of `iwm-fast pretrain` on given batches; static: with train.static_shapes."""

    version = __version__

    def __init__(
        self, shape: Shape, inputs: Sequence[Inputs], ranks: Ranks, conditioning: str, *, static: bool = False
    ) -> None:
        self.name = f"iwm-fast {conditioning}{' static' if static else ''}"
        self._batches = [_batch(one, ranks.device) for one in inputs]
        config = _shaped(shape.config(conditioning, bf16=ranks.device.type == "cuda"), static=static)
        self.trainer = prepare_trainer(config, ActionSpace(), BatchStream(self._batches), ranks)

    def step(self) -> float:
        """Run one step. Return its loss where it is logged, in the first step; else nan, as in training."""
        record = self.trainer.train_step()
        return record["loss"] if record else float("nan")

    def saw(self) -> list[str]:
        """Return fingerprints of the batches' masks."""
        return [
            fingerprint(
                np.split(b.patches.context, np.cumsum(b.patches.context_lengths)[:-1]),
                np.split(b.patches.target, np.cumsum(b.patches.target_lengths)[:-1]),
            )
            for b in self._batches
        ]


def _batch(inputs: Inputs, device: torch.device) -> Batch:
    patches, ids = inputs.masks.patch_sets(), np.arange(len(inputs.source))
    totals = int(patches.context_lengths.sum()), int(patches.target_lengths.sum())
    source, target = inputs.source.to(device), inputs.target.to(device)
    return Batch(source, target, inputs.action, patches, ids, np.zeros_like(ids), *totals)


def _shaped(config: Config, *, static: bool) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"static_shapes": static})})


def forward_backward(model: IWM, inputs: Inputs, rounding: Rounding | None = None) -> torch.Tensor:
    """Return a batch's loss, the mean over its predicted tokens, with gradients; on the inputs' device."""
    patches, device = inputs.masks.patch_sets(), inputs.source.device
    parts: list[Any] = []
    for rows, lengths in ((patches.context, patches.context_lengths), (patches.target, patches.target_lengths)):
        padding = () if rounding is None else rounding.padding(len(rows))
        parts += pack(rows, lengths, device, padding, None if rounding is None else rounding.longest)
    scale = 1.0 / (len(patches.target) * model.encoder.width)
    loss: torch.Tensor = model(inputs.source, inputs.target, inputs.action, *parts, loss_scale=scale).loss
    loss.backward()
    return loss


def padded_operations(shape: Shape, inputs: Sequence[Inputs], conditioning: str) -> list[int]:
    """Return the FLOPs of a step with static shapes on each of `inputs`, padding included, as torch counts them."""
    config = _shaped(shape.config(conditioning, bf16=False), static=True)
    with torch.device("meta"):
        model = IWM(config.model, inputs[0].action.shape[1])
    rounding = rounding_of(config, shape.batch)
    return [counted_flops(lambda one=one: forward_backward(model, one, rounding)) for one in inputs]  # type: ignore[misc]


def padding_difference(shape: Shape, inputs: Inputs, conditioning: str) -> float:
    """Return the difference of the loss with static shapes from that without, with the same weights in fp32."""
    config = _shaped(shape.config(conditioning, bf16=False), static=True)
    torch.manual_seed(0)
    model = IWM(config.model, inputs.action.shape[1])
    found, expected = (forward_backward(model, inputs, r) for r in (rounding_of(config, shape.batch), None))
    return float(((found - expected) / expected).abs().detach())


def operations(shape: Shape, inputs: Sequence[Inputs], conditioning: str) -> list[tuple[int, int]]:
    """Return the FLOPs of a step on each of `inputs`, on the meta device: (torch's count, iwm-fast's formula)."""
    config = shape.config(conditioning, bf16=False)
    actions = inputs[0].action.shape[1]
    with torch.device("meta"):
        model = IWM(config.model, actions)
    found = []
    for one in inputs:
        patches = one.masks.patch_sets()
        formula = step_flops(config.model, actions, patches.context_lengths, patches.target_lengths).total
        found.append((counted_flops(lambda one=one: forward_backward(model, one)), formula))  # type: ignore[misc]
    return found
