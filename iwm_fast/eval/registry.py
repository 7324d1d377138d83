"""The evaluations: their requirements, functions, JSON names and drawings.

`iwm-fast evaluate --what` with its help, the documents in RUN/results and the report's sections read this table. A new
evaluation is a module and one entry here. Functions are named as "module:function" and loaded when they are called: the
command line's help reads the table and loads no torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iwm_fast.errors import UserError
from iwm_fast.eval.defaults import COMPONENT_IMAGES

__all__ = [
    "CannotRunError",
    "Evaluation",
    "Kind",
    "Measure",
    "Need",
    "evaluation",
    "evaluations",
    "full_help",
    "measure",
    "names",
    "needed",
    "register",
    "unusual",
    "usual",
    "what_help",
]

# Kinds of data: images, from which views are made, or triplets of frames and recorded actions.
Kind = Literal["images", "triplets"]
# Requirements beside the data themselves: training images, their classes, a colour jitter that varies.
Need = Literal["training images", "classes", "jitter"]


class CannotRunError(UserError):
    """One evaluation has no room or no data here; others may have."""


@dataclass(frozen=True)
class Measure:
    """How an evaluation runs on one kind of data.

    run: function of an `ImageSubject` or `TripletSubject` that returns names and values for JSON; what it cannot
    measure is under ``not_run``, {name: why}. needs: requirements. settings: keys of the configuration that no other
    evaluation reads on this kind of data.
    """

    run: str | Callable[[Any], dict[str, Any]]
    needs: tuple[Need, ...] = ()
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """An entry: ``name`` in --what and JSON, ``title`` in the report's tables.

    images, triplets: how it runs there; if one is missing, ``elsewhere`` says why. quick: runs by default. reads_all:
    reads every image of both splits, so it runs first and finds bad images early. names: prefixes of its names in the
    JSON, default its own; names without any evaluation's prefix are about the data. drawing: the `Drawing` of its
    figures, shared by entries that name the same one; default `Drawing` itself, which suits one number with an
    interval.
    """

    name: str
    title: str
    images: Measure | None = None
    triplets: Measure | None = None
    elsewhere: str = ""
    quick: bool = True
    reads_all: bool = False
    names: tuple[str, ...] = ()
    drawing: str | Callable[[Sequence[Evaluation]], Any] | None = None

    def on(self, kind: Kind) -> Measure | None:
        """Return how it runs on this kind of data, or None."""
        return self.images if kind == "images" else self.triplets

    def owns(self, key: str) -> bool:
        """Return whether a JSON name belongs to this evaluation."""
        return any(key == name or key.startswith(f"{name}_") for name in self.names or (self.name,))


_NO_CLASSES = "triplets have no classes"
_TABLE = (
    Evaluation(
        "mrr",
        "MRR",
        images=Measure("iwm_fast.eval.world_model.mrr:evaluate_mrr", ("jitter",), ("eval.mrr_images",)),
        triplets=Measure("iwm_fast.eval.world_model.triplets:evaluate_next_frames", settings=("eval.bank",)),
        names=("mrr", "h1", "h5", "components"),
        drawing="iwm_fast.eval.report.sections.mrr_bars:MrrDrawing",
    ),
    Evaluation(
        "knn",
        "k-NN",
        images=Measure("iwm_fast.eval.representation.probes:evaluate_knn", ("classes",)),
        elsewhere=_NO_CLASSES,
        reads_all=True,
        drawing="iwm_fast.eval.report.sections.probe_table:ProbesDrawing",
    ),
    Evaluation(
        "linear",
        "linear probe",
        images=Measure("iwm_fast.eval.representation.probes:evaluate_linear", ("classes",)),
        elsewhere=_NO_CLASSES,
        reads_all=True,
        drawing="iwm_fast.eval.report.sections.probe_table:ProbesDrawing",
    ),
    Evaluation(
        "attentive",
        "attentive probe",
        images=Measure("iwm_fast.eval.representation.probes:evaluate_attentive", ("classes",)),
        elsewhere=_NO_CLASSES,
        quick=False,  # takes minutes where the others take seconds
        reads_all=True,
        drawing="iwm_fast.eval.report.sections.probe_table:ProbesDrawing",
    ),
    Evaluation(
        "equivariance",
        "equivariance",
        images=Measure("iwm_fast.eval.representation.equivariance:evaluate_equivariance", ("training images",)),
        elsewhere=_NO_CLASSES,
        names=("equivariance", "invariance", "r2", "cosine"),
        drawing="iwm_fast.eval.report.sections.equivariance_dial:EquivarianceDrawing",
    ),
    Evaluation(
        "rollout",
        "roll-out, error of the first step",
        triplets=Measure("iwm_fast.eval.world_model.rollout:evaluate_rollouts", settings=("eval.horizon",)),
        elsewhere="a roll-out needs triplets; these are images",
        drawing="iwm_fast.eval.report.sections.rollout_curves:RolloutDrawing",
    ),
)
_EVALUATIONS = {one.name: one for one in _TABLE}


def register(one: Evaluation) -> None:
    """Add an evaluation. Raise ValueError if its name is taken."""
    if one.name in _EVALUATIONS:
        raise ValueError(f"there is an evaluation {one.name!r} already; choose another name")
    _EVALUATIONS[one.name] = one


def evaluations(kind: Kind | None = None) -> list[Evaluation]:
    """Return all of them, or those that run on ``kind``, in the order of help, JSON and report."""
    return [one for one in _EVALUATIONS.values() if kind is None or one.on(kind) is not None]


def evaluation(name: str) -> Evaluation | None:
    """Return the one of that name, or None."""
    return _EVALUATIONS.get(name)


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """Return the names of `evaluations`."""
    return tuple(one.name for one in evaluations(kind))


def usual(kind: Kind) -> tuple[str, ...]:
    """Return the names of those that run by default."""
    return tuple(one.name for one in evaluations(kind) if one.quick)


def unusual(kind: Kind) -> tuple[str, ...]:
    """Return the names of those that run only if they are named, or with ``--full``."""
    return tuple(one.name for one in evaluations(kind) if not one.quick)


def needed(what: Sequence[str], kind: Kind) -> set[Need]:
    """Return the requirements of ``what`` on this kind of data."""
    chosen = (one.on(kind) for one in evaluations(kind) if one.name in what)
    return {need for how in chosen if how is not None for need in how.needs}


def what_help() -> str:
    """The help of ``iwm-fast evaluate --what``."""
    every = f"Images: {', '.join(names('images'))}; triplets: {', '.join(names('triplets'))}."
    return f"{every} Default of images: {', '.join(usual('images'))}; of triplets: {', '.join(usual('triplets'))}."


def full_help() -> str:
    """The help of ``iwm-fast evaluate --full``."""
    kinds: tuple[Kind, ...] = ("images", "triplets")
    more = [f"{name} ({kind})" for kind in kinds for name in unusual(kind)]
    return (
        f"Measure all that --what can name: also {', '.join(more)}; and rank each action component alone on all "
        f"images of MRR instead of {COMPONENT_IMAGES}."
    )


def measure(what: Sequence[str], kind: Kind, subject: Any) -> dict[str, Any]:
    """Run ``what`` on a subject; return all names and values, with ``not_run`` and ``reduced`` merged."""
    results: dict[str, Any] = {}
    chosen = [one for one in evaluations() if one.name in what]
    for one in sorted(chosen, key=lambda one: not one.reads_all):
        part = _measured(one, kind, subject)
        nested = {key: results.get(key, {}) | part[key] for key in ("not_run", "reduced") if key in part}
        results |= part | nested
    return results


def _measured(one: Evaluation, kind: Kind, subject: Any) -> dict[str, Any]:
    how = one.on(kind)
    if how is None:
        return {"not_run": {one.name: one.elsewhere}}
    for need in how.needs:
        why = subject.missing(need)
        if why is not None:
            return {"not_run": {one.name: why}}
    run = pkgutil.resolve_name(how.run) if isinstance(how.run, str) else how.run
    try:
        found: dict[str, Any] = run(subject)
    except CannotRunError as error:
        return {"not_run": {one.name: str(error)}}
    return found
