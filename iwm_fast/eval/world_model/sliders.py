"""One action component moved along its range, with the prediction at each stop, computed in advance.

The bank of an image holds the views of every stop of every slider and, up to its size, random jitters like MRR's bank.
So at each stop the correct view is among the others, and its rank shows how well it was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iwm_fast.actions.ranges import corruptions_drawn, jitter_range, strength_range, varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import JITTER, Corruption, Jitter, Views, component
from iwm_fast.config import ActionsConfig, Config
from iwm_fast.data.views.sampling import draw_bank
from iwm_fast.eval.features import device_of, evaluating
from iwm_fast.eval.world_model.bank import jittered_views
from iwm_fast.eval.world_model.distances import between, points, ties
from iwm_fast.eval.world_model.mrr import answers_to, bank_points, mean_ranks
from iwm_fast.eval.world_model.rendering import clean_views, render
from iwm_fast.models.iwm import IWM

__all__ = ["Slider", "SlidingExample", "Stop", "sliding_examples"]


@dataclass(frozen=True)
class Stop:
    """A stop of a slider: a physical value, the correct view, and the views nearest to the prediction.

    view, nearest: indices into the example's pictures; place: mean rank of the view in the bank. The last two by
    distance, "l2" over all tokens and "cosine" of the mean tokens. source: also an index, of the encoder's input if it
    was not the clean image.
    """

    value: float
    view: int
    nearest: dict[str, tuple[int, ...]]
    place: dict[str, float]
    source: int | None = None


@dataclass(frozen=True)
class Slider:
    """A component with its stops; ``neutral`` is the index of the neutral one.

    Jitter stops are in ascending order; corruptions start from ``none``.
    """

    name: str
    unit: str
    neutral: int
    stops: tuple[Stop, ...]
    none: float | None = None


@dataclass(frozen=True)
class SlidingExample:
    """A clean image uint8 (S, S, 3), its sliders, and the pictures (P, S, S, 3) that any stop shows."""

    source: np.ndarray
    pictures: np.ndarray
    bank: int
    sliders: tuple[Slider, ...]


def sliding_examples(
    model: IWM,
    config: Config,
    space: ActionSpace,
    images: Tensor,
    *,
    bank: int = 256,
    stops: int = 11,
    shown: int = 5,
    seed: int = 0,
    chunk: int = 64,
) -> list[SlidingExample]:
    """Return an example for each clean image (n, S, S, 3) uint8; none if the configuration has no jitter.

    A slider covers the range of one view's jitter, in an odd number of ``stops`` with the neutral one in the middle; or
    the strengths of a corruption of the source, with the clean view as the correct one. The bank exceeds ``bank`` if
    the stops alone are more.
    """
    names = varying(config.actions)
    if stops < 3 or stops % 2 == 0:
        raise ValueError(f"stops is {stops}; it must be odd, so that the middle is neutral, and at least 3")
    if not names:
        return []
    told = {name: _range(config.actions, name, stops) for name in names}
    asked = _alone(told)
    strengths = _strengths(config.actions, stops)
    truth = np.concatenate([np.arange(len(asked)), np.zeros(sum(map(len, strengths.values())), np.int64)])
    examples = []
    with evaluating(model):
        for sample, image in enumerate(images):
            filled = draw_bank(config.actions, seed, sample, max(bank - len(asked), 2))
            jitter = Jitter.concatenate([asked, filled])
            source = image.to(device_of(model))
            views = torch.cat([v.cpu() for v in jittered_views(source, jitter).split(chunk)])
            targets = bank_points(model, views.to(source.device), chunk)
            actions = torch.from_numpy(space.jitter_action(Jitter.neutral(len(asked)), asked)).to(source.device)
            z = model.encode(source[None], "context")
            sources, answered = _of_corrupted(model, space, image, strengths, chunk)
            answers = points(torch.cat([*answers_to(model, z, actions, chunk), *answered]))
            near = ties(targets)
            ranked = {
                name: _Ranked(far.cpu().numpy(), truth, near[name], shown)
                for name, far in between(answers, targets).items()
            }
            examples.append(_example(image.cpu().numpy(), views.numpy(), sources, ranked, told, strengths))
    return examples


class _Ranked:
    """From distances (stops, bank), with correct item truth[i] of row i: each row's nearest items, its own's rank."""

    def __init__(self, far: np.ndarray, truth: np.ndarray, tie: float, shown: int) -> None:
        self.places = mean_ranks(far, truth, tie)
        self.order = np.argsort(far, axis=1, kind="stable")[:, :shown]


def _strengths(actions: ActionsConfig, stops: int) -> dict[Corruption, list[float]]:
    """Return the strengths of corruptions, from the weakest to the strongest that training samples."""
    found = {}
    for corruption in corruptions_drawn(actions):
        if corruption.slides:
            weakest, strongest = sorted(strength_range(actions, corruption), key=corruption.reflected)
            values = np.linspace(weakest, strongest, stops - 1)
            whole = np.rint(values) if np.issubdtype(corruption.dtype, np.integer) else values
            found[corruption] = list(dict.fromkeys(whole.tolist()))
    return found


def _of_corrupted(
    model: IWM, space: ActionSpace, image: Tensor, strengths: Mapping[Corruption, Sequence[float]], chunk: int
) -> tuple[np.ndarray, list[Tensor]]:
    """Return the corrupted sources (n, S, S, 3) of the clean image, and the model's predictions from them."""
    if not strengths:
        return np.empty((0, *image.shape), np.uint8), []
    side, device = image.shape[0], device_of(model)
    views = Views.concatenate(
        [clean_views(side, len(values)).corrupted(what, np.array(values)) for what, values in strengths.items()]
    )
    sources, _ = render(image[None], views)
    parts = zip(sources.split(chunk), torch.from_numpy(space.encode(views)).split(chunk), strict=True)
    answers = [model.predict(model.encode(part.to(device), "context"), rows.to(device)).float() for part, rows in parts]
    return sources.numpy(), answers


def _range(actions: ActionsConfig, name: str, stops: int) -> np.ndarray:
    """Return the values of one view's component, factors or degrees, float32 (stops,)."""
    low, high = jitter_range(actions, name)
    if low == -high:
        return np.linspace(low, high, stops, dtype=np.float32)
    half = stops // 2
    below = np.linspace(low, 1.0, half + 1)[:-1]
    return np.concatenate([below, np.linspace(1.0, high, half + 1)]).astype(np.float32)


def _alone(told: dict[str, np.ndarray]) -> Jitter:
    """Return the neutral jitter once, then each component's other values by itself."""
    rows: list[dict[str, float]] = [{}]
    for name, values in told.items():
        rows += [{name: value} for i, value in enumerate(values) if i != len(values) // 2]
    return Jitter(**{n: np.array([row.get(n, component(n).neutral) for row in rows], np.float32) for n in JITTER})


def _example(
    source: np.ndarray,
    views: np.ndarray,
    sources: np.ndarray,
    ranked: dict[str, _Ranked],
    told: dict[str, np.ndarray],
    strengths: dict[Corruption, list[float]],
) -> SlidingExample:
    """Return the stops of each slider; only pictures that a stop shows are included, the corrupted sources last."""
    count = 1 + sum(len(values) - 1 for values in told.values())
    kept = np.unique(np.concatenate([np.arange(count), *(r.order.ravel() for r in ranked.values())]))
    where = {int(view): place for place, view in enumerate(kept)}

    def stop(row: int, value: float) -> Stop:
        nearest = {name: tuple(where[int(view)] for view in r.order[row]) for name, r in ranked.items()}
        places = {name: float(r.places[row]) for name, r in ranked.items()}
        seen = len(kept) + row - count if row >= count else None
        return Stop(float(value), where[row if seen is None else 0], nearest, places, seen)

    sliders, first = [], 1
    for name, values in told.items():
        middle = len(values) // 2
        rows = [*range(first, first + middle), 0, *range(first + middle, first + 2 * middle)]
        stops = tuple(stop(row, value) for row, value in zip(rows, values, strict=True))
        sliders.append(Slider(name, component(name).unit, middle, stops))
        first += 2 * middle
    for what, drawn in strengths.items():
        stops = (stop(0, what.none), *(stop(row, value) for row, value in enumerate(drawn, start=first)))
        sliders.append(Slider(what.column, component(what.column).unit, 0, stops, what.none))
        first += len(drawn)
    return SlidingExample(source, np.concatenate([views[kept], sources]), len(views), tuple(sliders))
