"""Pairs of views of clean images under a run's own actions, and the components that can be regressed from them.

A pair is sampled as in training, source first, with two differences: it starts from the whole clean image, and its
colour jitter is sampled as the bank's, so it is always applied and its strength can be set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.ranges import corruptions_drawn, varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import CORRUPTIONS, JITTER, Component, Jitter
from iwm_fast.config import ActionsConfig
from iwm_fast.data.views.sampling import draw_bank, draw_views
from iwm_fast.eval.world_model.bank import jittered_views
from iwm_fast.eval.world_model.rendering import clean_views, render

__all__ = ["FEWEST", "Pairs", "draw_pairs", "left_out", "left_out_line", "only_where"]

Floats = NDArray[np.float64]

# With fewer, more than one resample in 20,000 has none of them and the interval's ends are meaningless.
FEWEST = 10
# A strength has a meaning only for pairs to which the transformation was applied.
_ONLY_WHERE = {corruption.strength: corruption.name for corruption in CORRUPTIONS if corruption.strength}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Two views of each image, uint8 (n, S, S, 3), source first, and the action from source to target.

    action: float64 (n, K), normalised as in `transforms.COMPONENTS` and of difference form, one column per name.
    """

    first: Tensor
    second: Tensor
    action: Floats
    names: tuple[str, ...]


def draw_pairs(images: Tensor, actions: ActionsConfig, *, first_sample: int = 0, seed: int = 0) -> Pairs:
    """Return two views of each clean image (n, S, S, 3) uint8; a function of (seed, first_sample + row) alone.

    The action is target minus source whatever ``actions.form``, with all components of the configuration's groups.
    """
    count, side = images.shape[:2]
    samples = first_sample + np.arange(count, dtype=np.int64)
    views = draw_views(actions, seed, np.zeros(count, np.int64), samples, np.full((count, 2), side))
    if views.shared_geometry:  # no action encodes training's crop, which both views share
        whole = clean_views(side, count).target_geometry
        views = dataclasses.replace(views, target_geometry=whole, source_geometry=whole)
    drawn: list[Jitter] = []
    if varying(actions):
        drawn = [draw_bank(actions, seed, int(sample), 2) for sample in samples]
        source, target = (Jitter.concatenate([jitter.take(np.array([i])) for jitter in drawn]) for i in (0, 1))
        views = dataclasses.replace(views, source=source, target=target)
    if views.shared_geometry and not corruptions_drawn(actions):
        jitters = drawn or [Jitter.neutral(2)] * count
        both = torch.stack([jittered_views(image, jitter) for image, jitter in zip(images, jitters, strict=True)])
        first, second = both[:, 0], both[:, 1]
    else:
        first, second = render(images, views)
    space = ActionSpace(actions.groups)
    return Pairs(first, second, space.encode(views).astype(np.float64), space.names)


def only_where(action: Floats, names: Sequence[str], name: str) -> NDArray[np.bool_]:
    """Return the pairs (n,) on which component ``name`` is regressed: all; for a strength, those that have its flag.

    ``action`` and ``names``: of `Pairs`.
    """
    flag = _ONLY_WHERE.get(name)
    if flag is None:
        return np.ones(len(action), bool)
    return np.asarray(action[:, names.index(flag)] > 0.5)


def left_out(actions: ActionsConfig, *, training: Floats, test: Floats) -> dict[str, str]:
    """Return components that cannot be regressed, and why: by the configuration, or by the sampled pairs.

    ``training``, ``test``: their actions, of `Pairs`.
    """
    space = ActionSpace(actions.groups)
    reasons = {}
    for component in space.components:
        reason = _still(actions, component.name)
        for which, action in (("training", training), ("test", test)):
            reason = reason or _too_few(component, action, space.names, which)
        if reason is not None:
            reasons[component.name] = reason
    return reasons


def left_out_line(reasons: Mapping[str, str]) -> str:
    """Return the names by reason, in one line: "a, b (why), c (why)"."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())


def _still(actions: ActionsConfig, name: str) -> str | None:
    """Return the key that keeps a component neutral, or None."""
    if name in JITTER:
        keys = ["strength", name]
    else:
        key = f"{_ONLY_WHERE.get(name, name.partition('_')[0])}_probability"  # rotation_1 to rotation_3 have one
        keys = [key] if hasattr(actions, key) else []
    return next((f"actions.{key} is 0" for key in keys if getattr(actions, key) == 0), None)


def _too_few(component: Component, action: Floats, names: Sequence[str], which: str) -> str | None:
    """Return why these pairs cannot train or test the component, or None."""
    rows = only_where(action, names, component.name)
    values = action[rows, names.index(component.name)]
    if len(values) < min(FEWEST, len(rows)):
        return f"{len(values)} of {len(rows)} {which} pairs have a {_ONLY_WHERE[component.name]}; {FEWEST} are needed"
    if np.ptp(values) == 0:
        return f"the same in all {len(values)} {which} pairs that it applies to"
    if component.unit == "flag" and (with_it := int(values.sum())) < FEWEST:
        return f"{with_it} of {len(values)} {which} pairs have it; {FEWEST} are needed"
    if component.unit == "flag" and (without := len(values) - with_it) < FEWEST:
        return f"{without} of {len(values)} {which} pairs lack it; {FEWEST} are needed"
    return None
