"""The training step: its time, memory and useful operations, after its answer was checked against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.actions.transforms import ActionSpace
from iwm_fast.config import Config
from iwm_fast.cost.flops import step_flops
from iwm_fast.cost.rounding import padded_share
from iwm_fast.data.batch import Batch
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.sources import Patience
from iwm_fast.data.triplet_stream import PairStream
from iwm_fast.data.triplets import Triplets, resolve_triplets
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.metrics.throughput import peak_flops
from iwm_fast.engine.step import Trainer
from iwm_fast.kernels import compiled_variants
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.memory import peak_of
from iwm_fast.measure.stats import median_of
from iwm_fast.measure.synthetic import BatchStream, synthetic_stream
from iwm_fast.measure.timing import Clocked, clocked
from iwm_fast.models import IWM, Segments
from iwm_fast.models.compiled_regions import compilations

__all__ = ["check_answer", "described", "measure_step", "opened_stream", "row_of", "settle"]

# ‖working − float64‖ / ‖float64‖ of the loss: fp32 sums lose 1e-6, bf16 rounds each of some dozen layers by 2⁻⁸.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
_CHECKED_IMAGES = 2
# Batches of other lengths may meet kernels that were not compiled yet: this many steps in a row have to compile none.
_QUIET_STEPS, _LONGEST_WARM_UP = 4, 60
# Different batches of random pixels: a training meets other lengths at each step.
_BATCHES = 8


class WrongAnswerError(RuntimeError):
    """A step whose loss is not what float64 gives: it is not timed."""


def described(config: Config, root: Path | None) -> tuple[Config, Triplets | None]:
    """The configuration with what its actions are, and the triplets where `root` is a manifest of them, as `pretrain`.

    Without `root` only the manifest's actions are read, from data.root, unless actions.external says them. UserError
    where nothing does, or where data and actions do not fit together.
    """
    if root is None and (config.actions.groups != ("external",) or config.actions.external is not None):
        return config, None
    data = config.data.model_copy(update={} if root is None else {"root": str(root)})
    found, triplets = resolve_triplets(config.model_copy(update={"data": data}))
    return found, None if root is None else triplets


@contextlib.contextmanager
def opened_stream(
    config: Config, space: ActionSpace, ranks: Ranks, root: Path | None, triplets: Triplets | None = None
) -> Iterator[BatchStream | TrainingStream]:
    """Batches of `triplets` or of the images below `root` through DALI, or made of random pixels where it is None."""
    stream: BatchStream | TrainingStream
    if root is None:
        stream = synthetic_stream(config, space, ranks.device, rank=ranks.rank, world=ranks.world, steps=_BATCHES)
    elif triplets is not None:
        stream = PairStream(config, triplets, space, rank=ranks.rank, world=ranks.world)
    else:
        patience = Patience(config.data.store_timeout, config.data.store_attempts)
        files = list_images(str(root), config.data.source, patience)
        stream = TrainingStream(config, files, space, rank=ranks.rank, world=ranks.world)
    try:
        yield stream
    finally:
        stream.close()


def check_answer(trainer: Trainer, config: Config, batch: Batch, space: ActionSpace) -> float:
    """Relative error of the loss of two images against float64 in plain PyTorch on the CPU, with the same weights.

    Before the first step, when both have the weights of the seed. Raises WrongAnswerError above `TOLERANCE`.
    """
    torch.manual_seed(config.train.seed)
    exact = IWM(config.model, space.dim).double()
    with torch.no_grad():
        wanted = float(_loss(exact, batch, torch.device("cpu"), trainer.predicts))
    with torch.set_grad_enabled(config.train.compile):  # compiled code for training is other code than for looking
        found = float(_loss(trainer.zero.engine.module, batch, trainer.ranks.device, trainer.predicts).detach())
    error = abs(found - wanted) / abs(wanted)
    if not error <= TOLERANCE[config.train.precision]:
        raise WrongAnswerError(f"the loss is {found} where float64 gives {wanted}: not timed")
    return error


def _loss(model: Any, batch: Batch, device: torch.device, predicts: str) -> torch.Tensor:
    """Of the batch's first images with all their sources, summed."""
    patches, few = batch.patches, slice(0, _CHECKED_IMAGES * (len(batch.source) // len(batch.target)))
    context = torch.from_numpy(patches.context[: patches.context_lengths[few].sum()]).to(device)
    seen = Segments.from_lengths(patches.context_lengths[few], device)
    asked, asked_segments = context, seen
    if predicts == "target":
        asked = torch.from_numpy(patches.target[: patches.target_lengths[few].sum()]).to(device)
        asked_segments = Segments.from_lengths(patches.target_lengths[few], device)
    pixels = (view.to(device) for view in (batch.source[few], batch.target[:_CHECKED_IMAGES]))
    loss: torch.Tensor = model(*pixels, batch.action[few].to(device), context, seen, asked, asked_segments).loss
    return loss


def measure_step(
    name: str, config: Config, ranks: Ranks, *, root: Path | None = None, repeats: int = 30, warm_up: int = 3,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """One row: every repeat's seconds, their median, images a second, operations, memory, and the check's error."""
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


def settle(trainer: Trainer, least: int) -> int:
    """Train until the last of at least `least` steps have compiled nothing; how many steps that took."""
    quiet = 0
    if trainer.config.train.cuda_graph:
        # A size is captured when it comes again after nothing was compiled: in the third round at the latest.
        least = max(least, 3 * _BATCHES)
    for step in range(1, least + _LONGEST_WARM_UP + 1):
        before = _made(trainer)
        trainer.train_step()
        quiet = quiet + 1 if _made(trainer) == before else 0
        if step >= least and quiet >= min(step, _QUIET_STEPS):
            return step
    return least + _LONGEST_WARM_UP


def _made(trainer: Trainer) -> int:
    """Kernels and regions compiled, and graphs captured."""
    graphed = trainer.zero.graphed
    return compiled_variants() + compilations() + (graphed.captures if graphed else 0)


def row_of(
    name: str, config: Config, space: ActionSpace, taken: list[Clocked], device: torch.device
) -> dict[str, Any]:  # fmt: skip
    """What the times say of a configuration: per second, per operation, and per share of a known peak.

    An image is a decoded one: it has one target, and sources_per_target sources.
    """
    middle, images = median_of([one.seconds for one in taken]), config.train.global_batch
    sources = config.views.sources_per_target
    sample = next(iter(synthetic_stream(config, space, torch.device("cpu"), steps=1)))
    lengths = sample.patches.context_lengths, sample.patches.target_lengths
    asked = None if config.model.predictor.kind == "mlp" else lengths[1]
    counted = step_flops(config.model, space.dim, *lengths, sources)
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
