"""Run `benchmarks.baselines.plain_step` on given batches, eager or compiled, with weights from iwm-fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from iwm_fast.benchmarks.adapters.inputs import Inputs, Shape, fingerprint, normalised
from iwm_fast.benchmarks.baselines.plain_step import PlainBatch, PlainIWM, PlainShape, PlainStep
from iwm_fast.config.schema import ENCODERS
from iwm_fast.measure.flop_count import counted_flops

__all__ = ["Plain", "operations", "plain_batch", "plain_shape", "plain_state"]

# Names within a block: iwm-fast's to the plain module's.
_BLOCK = {
    "attn.qkv": "qkv", "attn.proj": "proj", "mlp.norm_weight": "norm2.weight", "mlp.norm_bias": "norm2.bias",
    "mlp.w_in": "fc1.weight", "mlp.b_in": "fc1.bias", "mlp.w_out": "fc2.weight", "mlp.b_out": "fc2.bias",
    "patch_embed.proj.": "patch_embed.", "feature.w_in": "mix.0.weight", "feature.b_in": "mix.0.bias",
    "feature.w_out": "mix.2.weight", "feature.b_out": "mix.2.bias", "feature.out.": "mix.4.",
    "target_encoder.": "target.",
}  # fmt: skip


class Plain:
    """The plain PyTorch step on given batches."""

    version = str(torch.__version__)

    def __init__(self, shape: Shape, inputs: Sequence[Inputs], device: torch.device, *, compiled: bool = False) -> None:
        self.name = "plain compile" if compiled else "plain"
        self.model = PlainIWM(plain_shape(shape, inputs[0].action.shape[1])).to(device)
        self._step = PlainStep(self.model, compiled=compiled)
        self._batches = [plain_batch(one, device) for one in inputs]
        self._next = 0

    def step(self) -> float:
        """Run one step; return the loss."""
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        return self._step(batch)

    def saw(self) -> list[str]:
        """Return fingerprints of the batches' masks."""
        return [fingerprint(_unpadded(b.context, b.seen), _unpadded(b.predicted, b.asked)) for b in self._batches]


def plain_shape(shape: Shape, actions: int) -> PlainShape:
    """Return the plain module's sizes."""
    size = ENCODERS[shape.encoder]
    return PlainShape(
        shape.image, shape.patch, size.depth, size.width, size.heads, shape.predictor_depth, shape.predictor_width,
        actions,
    )  # fmt: skip


def plain_batch(inputs: Inputs, device: torch.device) -> PlainBatch:
    """Return dense rows, padded to the longest."""
    context, seen = _padded(list(inputs.masks.context), device)
    predicted, asked = _padded(inputs.masks.unions(), device)
    source, target = (normalised(v.to(device)) for v in (inputs.source, inputs.target))
    return PlainBatch(source, target, inputs.action.to(device), context, seen, predicted, asked)


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    dense = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    real = np.zeros(dense.shape, dtype=bool)
    for i, row in enumerate(rows):
        dense[i, : len(row)], real[i, : len(row)] = row, True
    return torch.from_numpy(dense).to(device), torch.from_numpy(real).to(device)


def _unpadded(rows: Tensor, real: Tensor) -> list[np.ndarray]:
    # Copied to the host whole: reading each row's length on the device would synchronise per row.
    return [row[kept] for row, kept in zip(rows.cpu().numpy(), real.cpu().numpy(), strict=True)]


def plain_state(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of an `IWM` with `feature` conditioning into that of a `PlainIWM`."""
    state = {}
    for name, value in ours.items():
        if name == "predictor.feature.w_action":
            continue
        tensor = value
        if name == "predictor.feature.w_in":
            tensor = torch.cat([value, ours["predictor.feature.w_action"]], dim=1)
        for old, new in _BLOCK.items():
            name = name.replace(old, new)  # noqa: PLW2901
        state[name] = tensor
    return state


def operations(shape: Shape, inputs: Sequence[Inputs]) -> list[int]:
    """Return the step's FLOPs on each of `inputs`, on the meta device, padding included: it is computed."""
    device = torch.device("meta")
    with device:
        model = PlainIWM(plain_shape(shape, inputs[0].action.shape[1]))
    return [counted_flops(lambda one=one: model(plain_batch(one, device)).backward()) for one in inputs]  # type: ignore[misc]
