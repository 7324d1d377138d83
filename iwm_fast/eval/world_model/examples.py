"""Examples of the world model at work: the correct view, and the views that it ranks first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iwm_fast.actions.ranges import varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import JITTER
from iwm_fast.config import Config
from iwm_fast.eval.features import bypass_encoder, device_of, evaluating
from iwm_fast.eval.world_model.bank import jittered_views, make_bank
from iwm_fast.eval.world_model.mrr import bank_distances
from iwm_fast.models.iwm import IWM

__all__ = ["RankedExample", "RankedView", "first_ranked", "ranked_examples"]


@dataclass(frozen=True)
class RankedView:
    """A view of the bank, uint8 (S, S, 3), its rank (1 is nearest), and whether it is the correct one."""

    image: np.ndarray
    place: int
    true: bool


@dataclass(frozen=True)
class RankedExample:
    """One image, one action of its bank, and the views ranked first by the model and by two controls."""

    source: np.ndarray  # uint8 (S, S, 3), clean
    target: np.ndarray  # uint8 (S, S, 3), the source under the action
    action: dict[str, float]  # brightness, contrast, saturation: factors; hue: degrees; or external values by name
    bank: int
    rank: float  # of the target among the bank, for the model
    rank_shuffled: float
    rank_neutral: float
    ranked: tuple[RankedView, ...]
    shuffled: tuple[RankedView, ...]
    neutral: tuple[RankedView, ...]


def first_ranked(distances: np.ndarray, views: np.ndarray, true: int, count: int) -> tuple[RankedView, ...]:
    """Return the ``count`` nearest of the views (N, S, S, 3), by their distances (N,); ``true`` is the correct one."""
    order = np.argsort(distances, kind="stable")[:count]
    return tuple(RankedView(views[item], place, bool(item == true)) for place, item in enumerate(order, start=1))


def ranked_examples(
    model: IWM,
    config: Config,
    space: ActionSpace,
    images: Tensor,
    *,
    bank: int = 256,
    shown: int = 8,
    seed: int = 0,
    chunk: int = 64,
) -> list[RankedExample]:
    """Return an example for each clean image (n, S, S, 3) uint8, always with its bank's first action.

    ``shown``: views of the model's ranking; half as many of each control's. Distance: L2 over all tokens. Banks are
    those of ``mean_reciprocal_rank`` with the same seed. Return None if the configuration has no jitter.
    """
    if not varying(config.actions):
        return []
    examples = []
    queries = np.arange(2, dtype=np.int64)  # the second is the shuffled action
    with evaluating(model):
        for i, image in enumerate(images):
            drawn = make_bank(config.actions, space, i, bank, seed=seed)
            source = image.to(device_of(model))
            found = bank_distances(
                model, source, drawn, queries, normalize=config.model.normalize_target,
                bypass=bypass_encoder(config.model), chunk=chunk,
            )  # fmt: skip
            views = torch.cat([part.cpu() for part in jittered_views(source, drawn.jitter).split(chunk)]).numpy()
            ranks = found.ranks("l2")
            rows = found.answers["l2"]
            few = max(1, shown // 2)
            examples.append(
                RankedExample(
                    source=source.cpu().numpy(),
                    target=views[0],
                    action={name: float(getattr(drawn.jitter, name)[0]) for name in JITTER},
                    bank=bank,
                    rank=float(ranks["model"][0]),
                    rank_shuffled=float(ranks["shuffled"][0]),
                    rank_neutral=float(ranks["neutral"][0]),
                    ranked=first_ranked(rows[0], views, 0, shown),
                    shuffled=first_ranked(rows[1], views, 0, few),
                    neutral=first_ranked(found.neutral["l2"], views, 0, few),
                )
            )
    return examples
