"""Times and useful FLOPs of the steps since the last logged one, and MFU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from iwm_fast.config import Config
from iwm_fast.cost.devices import peak_of
from iwm_fast.cost.flops import step_flops

__all__ = ["StepCounter", "peak_flops"]

COMPUTE = ("forward", "backward", "optimizer", "ema")


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak FLOP/s, or None where it is unknown (every CPU)."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


class StepCounter:
    """Sum steps; ``take`` returns means per step and resets the sums."""

    def __init__(self, config: Config, action_dim: int, device: torch.device) -> None:
        self._model, self._sources = config.model, config.views.sources_per_target
        self._action_dim = action_dim
        self._peak = peak_flops(device)
        self._static = config.train.static_shapes
        self._tokens = self._padding = 0
        self._steps: list[float] = []
        self._parts: dict[str, list[float]] = {}
        self._flops = 0.0

    @property
    def steps(self) -> int:
        """Steps added since the last ``take``."""
        return len(self._steps)

    def count(
        self,
        context: NDArray[np.int64],
        predicted: NDArray[np.int64],
        padding: int = 0,
        steps: NDArray[np.int64] | None = None,
    ) -> None:
        """Add a micro-batch's FLOPs, from the token counts of each source, (B · K,), those of one of its frames, and
        its tokens of padding; steps: as in `Batch`.
        """
        queried = 0 if self._model.predictor.kind == "mlp" else int(predicted.sum())
        self._tokens += int(context.sum()) * self._model.history + queried + padding
        self._padding += padding
        self._flops += step_flops(self._model, self._action_dim, context, predicted, self._sources, steps).total

    def add(self, step_s: float, parts: dict[str, float]) -> None:
        """Add one step's seconds, in all and by part."""
        self._steps.append(step_s)
        for name, seconds in parts.items():
            self._parts.setdefault(name, []).append(seconds)

    def take(self, images: int) -> dict[str, float | None]:
        """Return means per step: images/s, seconds, wait for data, overhead beside compute and data, MFU of useful
        FLOPs, and with static shapes the share of padding among context and predicted tokens.
        """
        total, steps = sum(self._steps), len(self._steps)
        compute = sum(sum(self._parts.get(name, [])) for name in COMPUTE)
        waited = sum(self._parts.get("data", []))
        taken = {
            "images_per_s": images * steps / total,
            "step_s": total / steps,
            "data_wait_s": waited / steps,
            "overhead_s": (total - compute - waited) / steps,
            "mfu": self._flops / total / self._peak if self._peak else None,
        }
        if self._static:
            taken["padded"] = self._padding / max(1, self._tokens)
        self._steps, self._parts, self._flops = [], {}, 0.0
        self._tokens = self._padding = 0
        return taken
