"""Time, memory and FLOPs of the training step, whose loss is first checked against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.cost.flops import step_flops
from iwm_fast.cost.tokens import padded_share
from iwm_fast.data.batch import Batch
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.metrics.throughput import peak_flops
from iwm_fast.engine.micro_batch import of_frames
from iwm_fast.engine.step import Trainer
from iwm_fast.measure.batches import described, opened_stream
from iwm_fast.measure.harness import prepare_trainer, settle
from iwm_fast.measure.memory import peak_of
from iwm_fast.measure.stats import median_of
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.measure.timing import Clocked, clocked
from iwm_fast.models import IWM, Segments
from iwm_fast.models.later_steps import every_patch, later_steps
from iwm_fast.models.packing import pack

__all__ = ["TOLERANCE", "WrongAnswerError", "check_answer", "measure_step", "row_of"]

# ‖loss − float64‖ / ‖float64‖: fp32 sums lose 1e-6; bf16 rounds each of some dozen layers by 2⁻⁸.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
_CHECKED_IMAGES = 2


class WrongAnswerError(RuntimeError):
    """The step's loss is not float64's: it is not timed."""


def check_answer(trainer: Trainer, config: Config, batch: Batch, space: ActionSpace) -> float:
    """Return the loss's relative error on two images, against plain PyTorch in float64 on the CPU.

    Call before the first step, when both have the same weights. Raise WrongAnswerError above `TOLERANCE`.
    """
    torch.manual_seed(config.train.seed)
    exact = IWM(config.model, space.dim).double()
    with torch.no_grad():
        wanted = float(_loss(exact, batch, torch.device("cpu"), trainer.predicts))
    with torch.set_grad_enabled(config.train.compile):  # without gradients other code would be compiled
        found = float(_loss(trainer.zero.engine.module, batch, trainer.ranks.device, trainer.predicts).detach())
    error = abs(found - wanted) / abs(wanted)
    if not error <= TOLERANCE[config.train.precision]:
        raise WrongAnswerError(f"the loss is {found}, float64 gives {wanted}: not timed")
    return error


def _loss(model: Any, batch: Batch, device: torch.device, predicts: str) -> torch.Tensor:
    """Sum the loss over the batch's first images with all their sources."""
    patches, sources = batch.patches, len(batch.patches) // len(batch)
    few, frames = slice(0, _CHECKED_IMAGES * sources), len(batch.source) // len(batch.patches)
    first = of_frames(patches.context[: patches.context_lengths[few].sum()], patches.context_lengths[few], frames)
    context, seen = pack(*first, device)
    asked, asked_segments = context, seen
    targets, told = batch.target[:_CHECKED_IMAGES], batch.action[few]
    later: dict[str, Any] = {}
    if batch.steps is not None:  # all samples have all steps, one step after the other
        horizon = int(batch.steps.max())
        asked, asked_segments = every_patch(_CHECKED_IMAGES, model.encoder.patches, device)
        later["later"] = later_steps(*first, batch.steps[few], horizon, model.encoder.patches, device)
        targets, told = (x.unflatten(0, (horizon, -1))[:, few].flatten(0, 1) for x in (batch.target, batch.action))
    elif predicts == "target":
        asked = torch.from_numpy(patches.target[: patches.target_lengths[few].sum()]).to(device)
        asked_segments = Segments.from_lengths(patches.target_lengths[few], device)
    pixels = (view.to(device) for view in (batch.source[: few.stop * frames], targets))
    loss: torch.Tensor = model(*pixels, told.to(device), context, seen, asked, asked_segments, **later).loss
    return loss


def measure_step(
    name: str, config: Config, ranks: Ranks, *, root: Path | None = None, repeats: int = 30, warm_up: int = 3,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """Return one row: every repeat's seconds, their median, images per second, FLOPs, memory, and the loss's error."""
    quiet = config.model_copy(update={"log": config.log.model_copy(update={"every_steps": 10**9})})
    quiet, triplets = described(quiet, root)
    if root is None and config.data.root is not None:
        say(f"{name}: pixels are random; data.root is not read")
    space = space_of(quiet.actions)
    with opened_stream(quiet, space, ranks, root, triplets) as stream:
        trainer = prepare_trainer(quiet, space, stream, ranks)
        error = check_answer(trainer, quiet, next(iter(synthetic_stream(quiet, space, ranks.device))), space)
        say(f"{name}: the loss is within {error:.1e} of float64")
        steps = settle(trainer, warm_up)
        taken = [clocked(trainer.train_step, ranks.device) for _ in range(repeats)]
        peak = peak_of(trainer.train_step, ranks.device)
    return row_of(name, quiet, space, taken, ranks.device) | {
        "data": "synthetic" if root is None else "files",
        "loss_error": error,
        "warm_up_steps": steps,
        "step_peak_bytes": peak,
    }


def row_of(
    name: str, config: Config, space: ActionSpace, taken: list[Clocked], device: torch.device
) -> dict[str, Any]:  # fmt: skip
    """Return a configuration's rates: images and FLOPs per second, and the share of a known peak.

    Images are decoded images: each has one target and sources_per_target sources.
    """
    middle, images = median_of([one.seconds for one in taken]), config.train.global_batch
    sources = config.views.sources_per_target
    sample = next(iter(synthetic_stream(config, space, torch.device("cpu"), steps=1)))
    lengths = sample.patches.context_lengths, sample.patches.target_lengths
    asked = None if config.model.predictor.kind == "mlp" else lengths[1]
    counted = step_flops(config.model, space.dim, *lengths, sources, sample.steps)
    operations, peak = counted.total / len(sample), peak_flops(device)
    return {
        "name": name,
        "images": images,
        "sources_per_target": sources,
        "precision": config.train.precision,
        "static_shapes": config.train.static_shapes,
        "cuda_graph": config.train.cuda_graph,
        "padded": padded_share(config, sample.patches.context_lengths, asked),
        "seconds": [one.seconds for one in taken],
        "cpu_seconds": [one.cpu_seconds for one in taken],
        "median_s": middle.value,
        "median_interval_s": [middle.low, middle.high],
        "images_per_s": images / middle.value,
        "sources_per_s": images * sources / middle.value,
        "operations_per_image": operations,
        "operations_per_s": operations * images / middle.value,
        "mfu": operations * images / middle.value / peak if peak else None,
    }
