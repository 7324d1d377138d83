"""Fit readers to tasks: one pass over the features trains a reader per learning rate, and the best one is returned.

AdamW, linear warm-up over the first twentieth of the steps, then cosine to 0. The learning rate is chosen on held-out
images. Some test images are scored during training, to plot a curve: nothing is chosen by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from iwm_fast.errors import UserError
from iwm_fast.eval.feature_cache import Features
from iwm_fast.eval.features import device_of, evaluating
from iwm_fast.eval.finetune.scores import Scores, task_loss
from iwm_fast.eval.finetune.tasks import Task, batches, in_order, steps_per_epoch
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.models.decay import decayed_parameters
from iwm_fast.models.task_model import Reader

__all__ = ["Fit", "Plan", "Point", "fit", "measure", "seeded"]

WARMUP = 0.05
# Of a curve: at most this many points, each of at most this many test images, and at most a tenth of the training's
# work (a training step is three forward passes) on all of them.
_POINTS, _CURVE_IMAGES, _FEWEST_IMAGES, _CURVE_SHARE = 20, 1024, 64, 0.3


@dataclass(frozen=True)
class Plan:
    """How to fit. rates: peak learning rates of the heads, one reader each. predictor_factor, encoder_factor: theirs
    over the head's. flip: mirror half of the images (pixels only).
    """

    rates: tuple[float, ...]
    steps: int
    batch: int = 128
    weight_decay: float = 0.01
    predictor_factor: float = 1.0
    encoder_factor: float = 1.0
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """A point of the curve after ``step`` steps. loss: mean training loss since the point before; test: the main metric
    of some test images (`Scores.main`, the mean over tasks), None if it was not evaluated.
    """

    step: int
    loss: float
    test: float | None


@dataclass(frozen=True, eq=False)
class Fit:
    """The reader with the best held-out score, its learning rate, and each rate's score, None where it diverged.

    curve: of that reader; its last point has no test score, because all test images are scored then. curve_images: test
    images of the other points, by task.
    """

    reader: Reader
    rate: float
    held_out: dict[float, float | None]
    curve: tuple[Point, ...] = ()
    curve_images: dict[str, int] = field(default_factory=dict)


def seeded(build: Callable[[], Reader], seed: int) -> Reader:
    """Call ``build`` with this seed; the caller's random state is unchanged."""
    with torch.random.fork_rng(devices=[]):  # parameters are initialised on the CPU
        torch.manual_seed(seed)
        return build()


def fit(
    build: Callable[[], Reader],
    tasks: Sequence[Task],
    plan: Plan,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[Point], None] | None = None,
) -> Fit:
    """Train a reader from ``build`` for each of ``plan.rates`` on the tasks' training rows, all from the same seed.

    A step takes a batch of each task and the mean of their losses. ``say`` gets each point of the curve except the
    last, for the rate whose loss is lowest there. Raise UserError if no rate keeps its loss finite.
    """
    readers = [seeded(build, plan.seed).train() for _ in plan.rates]
    device = device_of(readers[0].encoder)
    groups = [
        g for reader, rate in zip(readers, plan.rates, strict=True) for g in _groups(reader.to(device), rate, plan)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    streams = [_augmented(batches(task, plan.batch, plan.seed), plan) for task in tasks]
    last = torch.zeros(len(readers))
    curve = _Curve(readers, tasks, plan)
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _factor(step, plan.steps)
        optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(readers), device=device)
        for task, stream in zip(tasks, streams, strict=True):
            inputs, labels = (part.to(device, non_blocking=True) for part in next(stream))
            for place, reader in enumerate(readers):
                loss = task_loss(reader(inputs, task.name), labels) / len(tasks)
                loss.backward()  # each reader has its own parameters: its graph can be freed at once
                losses[place] += loss.detach()
        optimizer.step()
        last = losses
        point = curve.after(step + 1, losses)
        if point is not None and say is not None:
            say(point)
        if progress is not None:
            progress(step + 1, plan.steps)
    scores = [
        sum(measure(reader, task, task.train, held=True).main() for task in tasks) / len(tasks)
        if math.isfinite(float(loss)) and _learns(reader, tasks)
        else None
        for reader, loss in zip(readers, last, strict=True)
    ]
    ranked = [-1.0 if score is None else score for score in scores]
    best = ranked.index(max(ranked))
    if scores[best] is None:
        raise UserError(f"--lr {', '.join(f'{rate:g}' for rate in plan.rates)}: the loss is not finite; lower it")
    return Fit(
        readers[best].eval(),
        plan.rates[best],
        dict(zip(plan.rates, scores, strict=True)),
        tuple(points[best] for points in curve.points),
        curve.images,
    )


class _Curve:
    """Points of all readers, once per epoch if there are few epochs."""

    def __init__(self, readers: Sequence[Reader], tasks: Sequence[Task], plan: Plan) -> None:
        self._readers, self._tasks = readers, tasks
        passes = plan.steps / steps_per_epoch(max(int((~task.held).sum()) for task in tasks), plan.batch)
        self._marks = _marks(plan.steps, passes)
        budget = max(_FEWEST_IMAGES, int(_CURVE_SHARE * plan.steps * plan.batch / len(self._marks)))
        self._rows = [evenly_spaced(min(budget, _CURVE_IMAGES), len(task.test)) for task in tasks]
        self._sum, self._since = torch.zeros(len(readers)), 0
        self.images = {task.name: len(rows) for task, rows in zip(tasks, self._rows, strict=True)}
        self.points: list[list[Point]] = []

    def after(self, step: int, losses: Tensor) -> Point | None:
        """Record the readers' losses of a step; return the point that is due, if any. All but the last are scored."""
        self._sum = self._sum.to(losses) + losses
        self._since += 1
        if step not in self._marks:
            return None
        means = [loss / self._since for loss in self._sum.tolist()]  # the only device synchronisation
        self._sum, self._since = torch.zeros_like(self._sum), 0
        if step == max(self._marks):
            self.points.append([Point(step, loss, None) for loss in means])
            return None
        self.points.append([Point(step, loss, test) for loss, test in zip(means, self._tests(), strict=True)])
        return min(self.points[-1], key=lambda point: point.loss if math.isfinite(point.loss) else math.inf)

    def _tests(self) -> list[float]:
        """Return each reader's score over the rows of all tasks, which are read once."""
        totals = [0.0] * len(self._readers)
        for task, rows in zip(self._tasks, self._rows, strict=True):
            scores = [Scores(task.shape.classes, dense=task.shape.dense) for _ in self._readers]
            with evaluating(*self._readers):
                for inputs, labels in in_order(task.test, rows):
                    for reader, score in zip(self._readers, scores, strict=True):
                        device = device_of(reader.encoder)
                        score.add(reader(inputs.to(device), task.name), labels.to(device))
            totals = [total + score.main() / len(self._tasks) for total, score in zip(totals, scores, strict=True)]
        return totals


def _marks(steps: int, passes: float) -> frozenset[int]:
    """Return the steps after which a point of the curve is due, the last step included: after each epoch, after every
    few if there are many, several times per epoch if there are few.
    """
    count = min(_POINTS, max(1, round(passes)))
    while count < _POINTS // 4:
        count *= 2
    count = min(count, steps)
    return frozenset(round(steps * (place + 1) / count) for place in range(count))


def _learns(reader: Reader, tasks: Sequence[Task]) -> bool:
    """Return whether the loss of some held-out rows of each task is finite after the last update."""
    reader.eval()
    device, losses = device_of(reader.encoder), []
    with torch.inference_mode():
        for task in tasks:
            inputs, labels = next(in_order(task.train, task.held.nonzero()[0]))
            losses.append(task_loss(reader(inputs.to(device), task.name), labels.to(device)))
    return bool(torch.isfinite(torch.stack(losses)).all())


def measure(reader: Reader, task: Task, features: Features, *, held: bool = False) -> Scores:
    """Return scores on all rows of ``features`` or, with ``held``, on the held-out training rows."""
    reader.eval()
    scores = Scores(task.shape.classes, dense=task.shape.dense)
    device = device_of(reader.encoder)
    with torch.inference_mode():
        for inputs, labels in in_order(features, task.held.nonzero()[0] if held else None):
            scores.add(reader(inputs.to(device), task.name), labels.to(device))
    return scores


def _groups(reader: Reader, rate: float, plan: Plan) -> Iterator[dict[str, object]]:
    """Yield AdamW's groups: the rates of head, predictor and encoder, each decayed and not (`models.decay`)."""
    parts: list[tuple[nn.Module | None, float]] = [
        (reader.heads, 1.0),
        (reader.task_tokens, 1.0),
        (reader.predictor, plan.predictor_factor),
        (reader.trained_encoder, plan.encoder_factor),
    ]
    for module, factor in parts:
        if module is None:
            continue
        decays = decayed_parameters(module)
        for decayed, decay in ((True, plan.weight_decay), (False, 0.0)):
            chosen = [p for name, p in module.named_parameters() if p.requires_grad and decays[name] is decayed]
            if chosen:
                yield {"params": chosen, "weight_decay": decay, "peak": rate * factor}


def _factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, round(WARMUP * steps)))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _augmented(stream: Iterator[tuple[Tensor, Tensor]], plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    if not plan.flip:
        yield from stream
        return
    generator = torch.Generator().manual_seed(plan.seed)
    for images, labels in stream:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        mirrored = torch.where(chosen[:, None, None, None], images.flip(2), images)
        masks = labels if labels.ndim == 1 else torch.where(chosen[:, None, None], labels.flip(2), labels)
        yield mirrored, masks
