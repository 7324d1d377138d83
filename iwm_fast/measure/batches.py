"""Batches for measurements: a data set through DALI, or random pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.sources import Patience
from iwm_fast.data.triplet_stream import PairStream
from iwm_fast.data.triplets import Triplets, resolve_triplets
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.measure.synthetic import BatchStream, synthetic_stream

__all__ = ["BATCHES", "described", "opened_stream"]

# Number of different random batches: in training the lengths differ at each step.
BATCHES = 8


def described(config: Config, root: Path | None) -> tuple[Config, Triplets | None]:
    """Return the configuration with its actions, and the triplets if `root` is a manifest of them, as `pretrain` does.

    Without `root` only the manifest's actions are read, from data.root, unless actions.external has them. Raises
    UserError if neither has them, or if data and actions do not match.
    """
    if root is None and (not config.actions.is_external or config.actions.external is not None):
        return config, None
    data = config.data.model_copy(update={} if root is None else {"root": str(root)})
    found, triplets = resolve_triplets(config.model_copy(update={"data": data}))
    return found, None if root is None else triplets


@contextlib.contextmanager
def opened_stream(
    config: Config, space: ActionSpace, ranks: Ranks, root: Path | None, triplets: Triplets | None = None
) -> Iterator[BatchStream | TrainingStream]:
    """Open a stream of batches: `triplets`, images below `root` through DALI, or random pixels without `root`."""
    stream: BatchStream | TrainingStream
    if root is None:
        stream = synthetic_stream(config, space, ranks.device, rank=ranks.rank, world=ranks.world, steps=BATCHES)
    elif triplets is not None:
        stream = PairStream(config, triplets, space, rank=ranks.rank, world=ranks.world)
    else:
        files = list_images(str(root), config.data.source, Patience.of(config.data))
        stream = TrainingStream(config, files, space, rank=ranks.rank, world=ranks.world)
    try:
        yield stream
    finally:
        stream.close()
