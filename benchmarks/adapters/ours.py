"""iwm-fast's own step: the engine's loop, with DeepSpeed, optimizer, finite check and moving average."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import iwm_fast
from iwm_fast.actions import ActionSpace
from iwm_fast.benchmarks.adapters.inputs import Inputs, Shape, fingerprint
from iwm_fast.benchmarks.harness import prepare_trainer
from iwm_fast.benchmarks.synthetic import BatchStream
from iwm_fast.data.batch import Batch
from iwm_fast.engine.distributed import Ranks
from iwm_fast.models import IWM, Segments
from iwm_fast.planning.flop_count import counted_flops
from iwm_fast.planning.flops import step_flops

__all__ = ["Ours", "forward_backward", "operations"]


class Ours:
    """The step of `iwm-fast pretrain` on given batches."""

    version = iwm_fast.__version__

    def __init__(self, shape: Shape, inputs: Sequence[Inputs], ranks: Ranks, conditioning: str) -> None:
        self.name = f"iwm-fast {conditioning}"
        self._batches = [_batch(one, ranks.device) for one in inputs]
        config = shape.config(conditioning, bf16=ranks.device.type == "cuda")
        self.trainer = prepare_trainer(config, ActionSpace(), BatchStream(self._batches), ranks)

    def step(self) -> float:
        """One step. Its loss is read where it is logged, in the first step; nan otherwise, as in training."""
        record = self.trainer.train_step()
        return record["loss"] if record else float("nan")

    def saw(self) -> list[str]:
        """Fingerprints of the batches' masks."""
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


def forward_backward(model: IWM, inputs: Inputs) -> torch.Tensor:
    """The loss of a batch, the mean over its predicted tokens, with gradients; on the inputs' device."""
    patches, device = inputs.masks.patch_sets(), inputs.source.device
    asked = Segments.from_lengths(patches.target_lengths, device)
    loss: torch.Tensor = model(
        inputs.source, inputs.target, inputs.action, torch.from_numpy(patches.context).to(device),
        Segments.from_lengths(patches.context_lengths, device), torch.from_numpy(patches.target).to(device), asked,
        1.0 / (asked.total * model.encoder.width),
    ).loss  # fmt: skip
    loss.backward()
    return loss


def operations(shape: Shape, inputs: Sequence[Inputs], conditioning: str) -> list[tuple[int, int]]:
    """Operations of a step on each of `inputs`, on the meta device: (torch's count, iwm-fast's formula)."""
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
