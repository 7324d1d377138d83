"""Mean reciprocal rank: conditioned on an action, does the predictor find the view that the action leads to?

An image's clean view is encoded without a mask; the bank is the target representations of many jitters of that view.
For each queried action the predictor predicts all patches, and the bank is ranked by distance to the prediction. A rank
is 1 plus the number of nearer items plus half the number of others equally near. So a collapsed model scores 1 / 128.5
on a bank of 256, an oracle 1, and a random ranking H_256 / 256 = 0.0239.

Controls are ranked at the same time. ``shuffled`` is conditioned on the next query's action and ranks its own view.
``neutral`` is conditioned on no change; ``bypass`` uses the source's representation as the prediction, a frozen
target's where there is one. One ranking serves all queries of an image for both, so with every action of the bank
queried both are at chance exactly, unless there are ties. ``untrained_target`` ranks the predictions among the initial
target encoder's representations: predictions fit only the encoder that they were trained for.

Source of the metric: arXiv:2403.00504, section 3; bank, distances and controls are ours (docs/concepts.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.eval.features import EncoderName, bypass_encoder, device_of, evaluating
from iwm_fast.eval.reduced import reduced
from iwm_fast.eval.stats import bootstrap_interval, chance_hit, chance_mrr, evenly_spaced
from iwm_fast.eval.world_model.bank import Bank
from iwm_fast.eval.world_model.components import GEOMETRIC, component_bank, components
from iwm_fast.eval.world_model.distances import DISTANCES, between, points, ties
from iwm_fast.models.blocks import layer_norm_rows
from iwm_fast.models.iwm import IWM

if TYPE_CHECKING:
    from iwm_fast.eval.image_subject import ImageSubject

__all__ = [
    "CONTROLS",
    "Distances",
    "MrrResult",
    "answers_to",
    "bank_distances",
    "bank_points",
    "evaluate_mrr",
    "mean_ranks",
    "mean_reciprocal_rank",
]

CONTROLS = ("shuffled", "neutral", "bypass")
# Of a bank of one component, what is reported beside its mrr.
_PART = ("mrr", "mrr_interval", "h1", "h5", "mrr_chance", "mrr_shuffled", "mrr_neutral", "mrr_bank", "mrr_queries")


@dataclass(frozen=True)
class Distances:
    """Distances of one image: from each prediction (row) to each item of the bank (column), float64 on the CPU."""

    queries: np.ndarray  # (Q,) int64, items of the bank whose actions are queried
    answers: dict[str, np.ndarray]  # distance -> (Q, bank)
    neutral: dict[str, np.ndarray]  # distance -> (bank,)
    bypass: dict[str, np.ndarray]  # distance -> (bank,)
    ties: dict[str, float]  # distance -> difference up to which two items are equally near
    untrained: dict[str, np.ndarray] | None = None  # distance -> (Q, bank), targets of an untrained encoder

    def ranks(self, distance: str) -> dict[str, np.ndarray]:
        """Return the rank (Q,) of each query's own view, for the model and for each control."""
        answers, tie = self.answers[distance], self.ties[distance]
        same = {name: np.broadcast_to(getattr(self, name)[distance], answers.shape) for name in ("neutral", "bypass")}
        rows = {"model": answers, "shuffled": np.roll(answers, -1, axis=0), **same}
        if self.untrained is not None:
            rows["untrained_target"] = self.untrained[distance]
        return {name: mean_ranks(row, self.queries, tie) for name, row in rows.items()}


@dataclass(frozen=True)
class MrrResult:
    """Ranks by distance and by what was ranked ("model" or a control): float64 (images, queries)."""

    ranks: dict[str, dict[str, np.ndarray]]
    bank: int

    def mrr(self, what: str = "model", distance: str = "l2") -> float:
        """Return the mean of 1 / rank over queries and images."""
        return float((1 / self.ranks[distance][what]).mean())

    def summary(self) -> dict[str, Any]:
        """Return names and values for a table or JSON: mrr, h1, h5 with controls and chance, also as _cosine."""
        images, queries = self.ranks["l2"]["model"].shape
        out: dict[str, Any] = {
            "mrr_chance": chance_mrr(self.bank),
            "h1_chance": chance_hit(self.bank, 1),
            "h5_chance": chance_hit(self.bank, 5),
            "mrr_bank": self.bank,
            "mrr_images": images,
            "mrr_queries": queries,
        }
        for distance in DISTANCES:
            for what, ranks in self.ranks[distance].items():
                end = ("" if what == "model" else f"_{what}") + ("" if distance == "l2" else f"_{distance}")
                reciprocal = (1 / ranks).mean(axis=1)
                out[f"mrr{end}"] = float(reciprocal.mean())
                out[f"mrr{end}_interval"] = list(bootstrap_interval(reciprocal))
                for k in (1, 5):
                    out[f"h{k}{end}"] = float((ranks <= k).mean())
        return out


def mean_ranks(distances: np.ndarray, truth: np.ndarray, tie: float) -> np.ndarray:
    """Return the rank (Q,) of column truth[q] in row q of ``distances`` (Q, N), 1 is nearest; ties within ``tie`` share
    the mean rank.

    A NaN distance is farther than all others.
    """
    distances = np.nan_to_num(distances, nan=np.inf)
    own = np.take_along_axis(distances, truth[:, None], axis=1)  # (Q, 1)
    nearer: np.ndarray = (distances < own - tie).sum(axis=1)
    with np.errstate(invalid="ignore"):  # inf - inf
        equal: np.ndarray = ((np.abs(distances - own) <= tie) | (distances == own)).sum(axis=1) - 1
    return 1 + nearer + equal / 2


def answers_to(model: IWM, z: Tensor, actions: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield predictions (b, L, D) float32 for each of ``actions`` (n, A), from one source (1, L, D)."""
    for rows in actions.split(chunk):
        yield model.predict(z.expand(len(rows), -1, -1), rows).float()


def bank_points(model: IWM, views: Tensor, chunk: int) -> dict[str, Tensor]:
    """Return the `points` of the targets of views (N, S, S, 3)."""
    return points(torch.cat([model.targets(part).float() for part in views.split(chunk)]))


def bank_distances(
    model: IWM,
    image: Tensor,
    bank: Bank,
    queries: np.ndarray,
    *,
    normalize: bool,
    bypass: EncoderName = "context",
    chunk: int = 64,
    untrained: IWM | None = None,
) -> Distances:
    """Return the distances of one clean image (S, S, 3) uint8 on the model's device. Call within ``evaluating(model)``.

    ``normalize``, ``bypass``: the configuration's normalize_target, and `bypass_encoder`. ``untrained``: also rank the
    predictions among this model's targets.
    """
    device = image.device
    views = bank.targets(image)
    own = bank_points(model, views, chunk)
    strange = None if untrained is None else bank_points(untrained, views, chunk)
    seen = image if bank.source is None else bank.source.to(device)
    z = model.encode(seen[None], "context")  # (1, L, D)
    asked = torch.from_numpy(bank.actions[queries]).to(device)
    asked = torch.cat([asked, torch.zeros_like(asked[:1])])  # the last row is neutral
    # Normalised like the targets, or its scale alone would distinguish it.
    source = z if bypass == "context" else model.encode(seen[None], bypass)
    source = layer_norm_rows(source).float() if normalize else source.float()
    rows: dict[str, list[Tensor]] = {name: [] for name in DISTANCES}
    strange_rows: dict[str, list[Tensor]] = {name: [] for name in DISTANCES}
    for answer in (*answers_to(model, z, asked, chunk), source):
        found = points(answer)
        for name, far in between(found, own).items():
            rows[name].append(far)
        if strange is not None:
            for name, far in between(found, strange).items():
                strange_rows[name].append(far)
    all_rows = {name: torch.cat(parts).cpu().numpy() for name, parts in rows.items()}
    strange_answers = {name: torch.cat(parts).cpu().numpy()[:-2] for name, parts in strange_rows.items() if parts}
    return Distances(
        queries=queries,
        answers={name: rows[:-2] for name, rows in all_rows.items()},
        neutral={name: rows[-2] for name, rows in all_rows.items()},
        bypass={name: rows[-1] for name, rows in all_rows.items()},
        ties=ties(own),
        untrained=strange_answers or None,
    )


def evaluate_mrr(subject: ImageSubject) -> dict[str, Any]:
    """Return MRR over images spread evenly over the test images; also per component, if requested."""
    config, test = subject.config, subject.test
    wanted = subject.images if subject.images is not None else config.eval.mrr_images
    results: dict[str, Any] = {}
    if wanted > len(test):
        results["reduced"] = {"mrr_images": reduced(wanted, len(test), f"there are {len(test)} test images")}
    images, numbers = test.numbered_spread(wanted)
    fewer = subject.component_images if subject.components else None
    some = evenly_spaced(len(images) if fewer is None else fewer, len(images))
    if len(some) < len(images) and components(config.actions):
        why = "each component alone is ranked on fewer images; --full ranks all"
        entry = {"mrr_component_images": reduced(len(images), len(some), why)}
        results["reduced"] = results.get("reduced", {}) | entry
    parts: dict[str, dict[str, Any]] = {}
    for vary in (None, *components(config.actions)) if subject.components else (None,):
        summary = mean_reciprocal_rank(
            subject.model,
            config,
            subject.space,
            images if vary is None else images[torch.from_numpy(some)],
            numbers=numbers if vary is None else [numbers[i] for i in some],
            bank=config.eval.bank,
            queries=subject.queries if vary not in GEOMETRIC else None,
            vary=vary,
            untrained=subject.untrained if vary is None else None,
            progress=subject.tell("mrr" if vary is None else f"mrr, {vary} only"),
        ).summary()
        if vary is None:
            results |= summary
        else:
            parts[vary] = {key: summary[key] for key in _PART}
    flat = {f"mrr_only_{name}": part["mrr"] for name, part in parts.items()}
    return results | flat | ({"components": parts} if parts else {})


def mean_reciprocal_rank(
    model: IWM,
    config: Config,
    space: ActionSpace,
    images: Tensor,
    *,
    bank: int = 256,
    queries: int | None = None,
    vary: str | None = None,
    seed: int = 0,
    chunk: int = 64,
    numbers: Sequence[int] | None = None,
    untrained: IWM | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MrrResult:
    """Return ranks over clean ``images`` (n, S, S, 3) uint8, each with its own bank, of ``bank`` distinct jitters.

    ``queries``: queried actions, spread evenly over the bank; default all. ``vary``: a bank of one component alone, see
    `component_bank`. ``numbers``: each image's number, which seeds its bank; default 0 to n - 1. ``untrained``: a model
    for the control untrained_target. ``progress`` is called with (images done, images). The model's mode is unchanged.
    """
    if not len(images):
        raise ValueError("images is empty; at least one is needed")
    whose = range(len(images)) if numbers is None else numbers
    ranks: dict[str, dict[str, list[np.ndarray]]] = {distance: {} for distance in DISTANCES}
    with evaluating(*(model,) if untrained is None else (model, untrained)):
        for done, (number, image) in enumerate(zip(whose, images, strict=True), start=1):
            drawn = component_bank(config.actions, space, image, number, bank, seed=seed, vary=vary)
            size = len(drawn.actions)
            asked = evenly_spaced(size if queries is None else queries, size)
            if len(asked) < 2:
                raise ValueError(
                    f"queries is {queries} of a bank of {size}; at least two are needed to shuffle actions"
                )
            found = bank_distances(
                model,
                image.to(device_of(model)),
                drawn,
                asked,
                normalize=config.model.normalize_target,
                bypass=bypass_encoder(config.model),
                chunk=chunk,
                untrained=untrained,
            )
            for distance, by_what in ranks.items():
                for what, values in found.ranks(distance).items():
                    by_what.setdefault(what, []).append(values)
            if progress is not None:
                progress(done, len(images))
    return MrrResult({d: {what: np.stack(v) for what, v in by_what.items()} for d, by_what in ranks.items()}, size)
