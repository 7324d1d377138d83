"""Evaluate a model on triplets in one call: MRR among next frames, and roll-outs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.console import Count
from iwm_fast.data.triplets import Triplets
from iwm_fast.eval.features import bypass_encoder
from iwm_fast.eval.reduced import reduced
from iwm_fast.eval.registry import measure, usual
from iwm_fast.eval.world_model.examples import RankedExample, first_ranked
from iwm_fast.eval.world_model.frames import FrameReader, open_triplets
from iwm_fast.eval.world_model.next_frames import NextFrames, draw_next_frames, rank_next_frames, summarise_next_frames
from iwm_fast.eval.world_model.triplet_subject import TripletSubject
from iwm_fast.models.iwm import IWM

__all__ = ["evaluate_next_frames", "evaluate_triplets", "monitor_triplets"]

_SHOWN = 8


def evaluate_triplets(
    model: IWM,
    config: Config,
    space: ActionSpace,
    triplets: Triplets,
    *,
    what: Sequence[str] | None = None,
    bank: int | None = None,
    examples: int = 0,
    progress: Count | None = None,
) -> tuple[dict[str, Any], list[RankedExample]]:
    """Run ``what`` and return names and values like `evaluate_model`, and ``examples`` of rankings.

    ``what``: default all that runs on triplets. bank: ranked and queried next frames, default ``eval.bank``. Roll-outs:
    of ``eval.horizon`` steps, under ``rollout``. What needs classes is under ``not_run``, a bank larger than the set
    under ``reduced``, undecodable frames under ``left_out``.
    """
    reader = FrameReader(triplets, config.model.image, config.data)
    subject = TripletSubject(model, config, space, reader, bank=bank, examples=examples, progress=progress)
    results = measure(usual("triplets") if what is None else what, "triplets", subject)
    reader.left_out.check()
    return results | {"left_out": {"test": reader.left_out.record()}}, subject.shown


def evaluate_next_frames(subject: TripletSubject) -> dict[str, Any]:
    """Return MRR among next frames; the first of them are the subject's examples."""
    config, space = subject.config, subject.space
    wanted = subject.bank if subject.bank is not None else config.eval.bank
    frames = draw_next_frames(subject.reader, wanted, history=config.model.history)
    found, distances = rank_next_frames(
        subject.model,
        frames,
        normalize=config.model.normalize_target,
        bypass=bypass_encoder(config.model),
        progress=subject.tell("mrr"),
    )
    few = {"mrr_bank": (len(frames.bank), "next frames"), "mrr_images": (len(frames), "triplets")}
    smaller = {
        name: reduced(wanted, used, f"the set has {used} distinct {things}")
        for name, (used, things) in few.items()
        if used < wanted
    }
    ranks = {name: values[:, 0] for name, values in found.ranks["l2"].items()}
    chosen = range(min(subject.examples, len(frames)))
    subject.shown = [_example(frames, distances, ranks, space, query) for query in chosen]
    return summarise_next_frames(frames, found) | ({"reduced": smaller} if smaller else {})


def monitor_triplets(model: IWM, config: Config, space: ActionSpace, root: str | Path) -> dict[str, Any]:
    """Return MRR during training, as numbers for metrics.jsonl: mrr, mrr_shuffled, mrr_chance."""
    results, _ = evaluate_triplets(model, config, space, open_triplets(root, config), what=("mrr",))
    bad = results["left_out"]["test"]["count"]
    found = {key: results[key] for key in ("mrr", "mrr_shuffled", "mrr_chance")}
    return found | ({"eval_left_out_test": bad} if bad else {})


def _example(
    frames: NextFrames,
    distances: dict[str, NDArray[np.float64]],
    ranks: dict[str, NDArray[np.float64]],
    space: ActionSpace,
    query: int,
) -> RankedExample:
    views, true = frames.bank.numpy(), int(frames.truth[query])
    told = space.decode(frames.actions[query : query + 1].numpy())
    few = max(1, _SHOWN // 2)
    return RankedExample(
        source=frames.source[query, -1].numpy(),
        target=views[true],
        action={name: float(value[0]) for name, value in told.items() if value.dtype != bool or value[0]},
        bank=len(frames.bank),
        rank=float(ranks["model"][query]),
        rank_shuffled=float(ranks["shuffled"][query]),
        rank_neutral=float(ranks["neutral"][query]),
        ranked=first_ranked(distances["model"][query], views, true, _SHOWN),
        shuffled=first_ranked(distances["shuffled"][query], views, true, few),
        neutral=first_ranked(distances["neutral"][query], views, true, few),
    )
