"""Evaluation during training, sharded: each rank ranks and encodes its part of the images, and the parts are gathered.

An image's bank depends on its number only, so the metrics are the same for any number of ranks.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iwm_fast.actions.ranges import varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.engine.distributed.ranks import Ranks, gather, of_first
from iwm_fast.engine.distributed.signals import Abandoned
from iwm_fast.errors import UserError
from iwm_fast.eval.features import default_encoder, encoder_of, read_features
from iwm_fast.eval.reduced import reduced, reduced_lines
from iwm_fast.eval.representation.knn import NEIGHBOURS, knn_classify
from iwm_fast.eval.splits import FileSplit, cannot_classify, open_splits, require_same_classes
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.eval.unusable import LeftOut, left_out_lines
from iwm_fast.eval.world_model.frames import open_triplets
from iwm_fast.eval.world_model.mrr import MrrResult, mean_reciprocal_rank
from iwm_fast.eval.world_model.triplets import monitor_triplets
from iwm_fast.models.iwm import IWM
from iwm_fast.notices import tell_once

__all__ = ["OnlineEvaluator", "Share", "join_left_out", "join_shares", "measure_share"]

# Raised by reading, decoding and computing. One rank alone may raise; all must learn of it.
_FAULTS = (UserError, OSError, RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError)


class OnlineEvaluator:
    """k-NN and MRR of a model in training, or MRR among next frames if the data are triplets.

    An `iwm_fast.engine.evaluator.Evaluator`.
    """

    def unmeasured(self, config: Config) -> str | None:
        """Open what an evaluation opens; return why a part of it cannot run, or None."""
        root = config.eval.root or ""
        if config.actions.is_external:
            open_triplets(root, config)
            return None
        train, test = open_splits(root, config, limit=config.eval.images)
        missing = cannot_classify(train, test)
        if missing is None:
            require_same_classes(train, test)
            return None
        if not varying(config.actions):
            raise UserError(
                f"no evaluation can run during training: {missing}, and no jitter varies (actions.strength)"
            )
        return f"k-NN does not run during training: {missing}"

    def measure(
        self,
        model: IWM,
        config: Config,
        space: ActionSpace,
        ranks: Ranks,
        abandonable: Callable[[], AbstractContextManager[None]],
    ) -> dict[str, Any] | None:
        """Return metrics with their chance levels: every rank evaluates its share of the images, or rank 0 all."""
        if config.actions.is_external:
            return _of_triplets(model, config, space, ranks, abandonable)
        found: Share | str | None
        try:
            with abandonable():
                found = measure_share(model, config, space, config.eval.root or "", rank=ranks.rank, world=ranks.world)
        except Abandoned:
            found = None
        except _FAULTS as error:
            found = _reason(error, ranks)
        shares: list[Share | str | None] = gather(found, ranks.world, ranks.control)
        for share in shares:
            if isinstance(share, str):
                raise UserError(share)
        if None in shares:
            return None
        whole = [share for share in shares if isinstance(share, Share)]
        results = join_shares(whole, config.eval.bank)
        if ranks.first:
            left_out = {name: part.record() for name, part in join_left_out(whole).items()}
            for line in (*whole[0].said, *left_out_lines(left_out)):
                tell_once(f"eval.root: {line}")
        return results


def _reason(error: Exception, ranks: Ranks) -> str:
    """Return why a rank failed, for the others; print the traceback here unless it is an error of the user's."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error)
    return f"rank {ranks.rank}: {type(error).__name__}: {' '.join(str(error).split())}"


def _of_triplets(
    model: IWM,
    config: Config,
    space: ActionSpace,
    ranks: Ranks,
    abandonable: Callable[[], AbstractContextManager[None]],
) -> dict[str, Any] | None:
    """MRR among next frames, which has one bank: rank 0 evaluates, the others wait."""
    found: list[Any] = [None]
    if ranks.first:
        try:
            with abandonable():
                found[0] = monitor_triplets(model, config, space, config.eval.root or "")
        except Abandoned:
            found[0] = None
        except _FAULTS as error:
            found[0] = _reason(error, ranks)
    found = of_first(found, ranks)
    if isinstance(found[0], str):
        raise UserError(found[0])
    return None if found[0] is None else dict(found[0])


@dataclass(frozen=True, eq=False)
class Share:
    """One rank's results.

    numbers: of its ranked images, among all. ranks: by distance and by what was ranked, float64 (images of this rank,
    queries), None without images. train, test: mean tokens and labels of its images, None without classes. left_out: of
    each split, this rank's unusable images. labels: of all images of each split, and their classes, None without. said:
    which images are which split, and what they are too few for.
    """

    numbers: list[int]
    ranks: dict[str, dict[str, np.ndarray]] | None
    train: tuple[np.ndarray, np.ndarray] | None
    test: tuple[np.ndarray, np.ndarray] | None
    left_out: dict[str, LeftOut]
    labels: dict[str, np.ndarray | None]
    classes: tuple[str, ...]
    said: tuple[str, ...]


def measure_share(
    model: IWM, config: Config, space: ActionSpace, root: str | Path, *, rank: int = 0, world: int = 1
) -> Share:
    """Evaluate ``rank``'s part of ``world``: of the ranked images, and of at most ``eval.images`` of each split."""
    train, test = open_splits(root, config, limit=config.eval.images)
    numbers, ranks = _ranks(model, config, space, test, rank, world) if varying(config.actions) else ([], None)
    said = _said(train, test, config)
    left_out = {"train": train.left_out, "test": test.left_out}
    if cannot_classify(train, test) is not None:
        return Share(numbers, ranks, None, None, left_out, {}, (), said)
    require_same_classes(train, test)
    encoder = encoder_of(model, default_encoder(config.model))
    both = []
    for split in (train, test):
        mine = np.arange(rank, len(split), world)
        if not len(mine):
            both.append((np.zeros((0, encoder.width), np.float32), np.zeros(0, np.int64)))
            continue
        found = read_features([encoder], split.take(mine), "pooled")[0]
        both.append((found.values, found.labels))
    labels = {"train": train.files.labels, "test": test.files.labels}
    return Share(numbers, ranks, both[0], both[1], left_out, labels, train.classes, said)


def join_shares(shares: Sequence[Share], bank: int) -> dict[str, Any]:
    """Return numbers for metrics.jsonl: mrr, mrr_shuffled, mrr_chance, and with classes knn, knn_chance.

    And eval_left_out_train, eval_left_out_test if images cannot be used. ``shares``: of every rank, in any order;
    ``bank``: its size. Raise UserError if more of a split cannot be used than ``data.max_bad_fraction`` allows, or all
    of a class.
    """
    left_out = join_left_out(shares)
    for part in left_out.values():
        part.check()
    results: dict[str, Any] = {f"eval_left_out_{name}": len(part) for name, part in left_out.items() if len(part)}
    parts = [share.ranks for share in shares if share.ranks is not None]
    if parts:
        # In the order of the images, so that even the mean's rounding does not depend on the sharding.
        order = np.argsort([number for share in shares for number in share.numbers])
        joined = {
            distance: {what: np.concatenate([part[distance][what] for part in parts])[order] for what in by_what}
            for distance, by_what in parts[0].items()
        }
        summary = MrrResult(joined, bank).summary()
        results |= {key: summary[key] for key in ("mrr", "mrr_shuffled", "mrr_chance")}
    train = [share.train for share in shares if share.train is not None]
    test = [share.test for share in shares if share.test is not None]
    if train and test:
        (x, y), (x_test, y_test) = (
            tuple(np.concatenate(columns) for columns in zip(*part, strict=True)) for part in (train, test)
        )
        for name, found in (("train", y), ("test", y_test)):
            left_out[name].require_classes(shares[0].labels[name], found, shares[0].classes)
        results["knn"] = knn_classify(torch.from_numpy(x), y, torch.from_numpy(x_test), y_test).weighted
        results["knn_chance"] = float(np.bincount(y_test).max() / len(y_test))
    return results


def _said(train: FileSplit, test: FileSplit, config: Config) -> tuple[str, ...]:
    smaller = {
        name: reduced(asked, there, f"there are {there} {which} images")
        for name, asked, there, which in (
            ("eval.mrr_images", config.eval.mrr_images, len(test), "test"),
            ("knn_k", NEIGHBOURS, len(train), "training"),
        )
        if asked > there
    }
    return (*([] if train.layout is None else [train.layout.line()]), *reduced_lines(smaller))


def join_left_out(shares: Sequence[Share]) -> dict[str, LeftOut]:
    """Return what was left out of each split, over all ranks."""
    joined: dict[str, LeftOut] = {}
    for share in shares:
        for name, part in share.left_out.items():
            joined.setdefault(name, LeftOut(part.place, part.total, part.max_fraction)).merge(part)
    return joined


def _ranks(
    model: IWM, config: Config, space: ActionSpace, test: FileSplit, rank: int, world: int
) -> tuple[list[int], dict[str, dict[str, np.ndarray]] | None]:
    """Rank this rank's images; each keeps its number, which seeds its bank."""
    chosen = evenly_spaced(config.eval.mrr_images, len(test))
    kept, numbers = [], []
    for number in range(rank, len(chosen), world):
        kept.append(chosen[number])
        numbers.append(number)
    if not kept:
        return [], None
    read = list(test.take(np.array(kept, np.int64)).numbered())
    if not read:
        return [], None
    images, rows = zip(*read, strict=True)
    whose = [numbers[row] for row in np.concatenate(rows)]
    found = mean_reciprocal_rank(model, config, space, torch.cat(images), bank=config.eval.bank, numbers=whose)
    return whose, found.ranks
