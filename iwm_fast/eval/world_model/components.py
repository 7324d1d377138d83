"""Banks of one action component alone: which parts of the world does a model know?

brightness, contrast, saturation, hue: the bank varies this one and leaves the others neutral. grayscale, blur,
solarize: they corrupt the source, and the action encodes them; the bank is the jittered views of the clean image. flip,
rotation, crop (the geometric group): a bank of their distinct values: two, four, and the requested number of crops,
each with its own chance. Views that are not jitters are rendered by training's own graph.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from iwm_fast.actions.ranges import corruptions_drawn, strength_range, varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import CORRUPTIONS, JITTER, Corruption
from iwm_fast.config import ActionsConfig
from iwm_fast.data.views.sampling import draw_views
from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.bank import Bank, make_bank
from iwm_fast.eval.world_model.rendering import clean_views, render

__all__ = ["DESTRUCTIVE", "GEOMETRIC", "component_bank", "components"]

DESTRUCTIVE = tuple(corruption.name for corruption in CORRUPTIONS)
GEOMETRIC = ("flip", "rotation", "crop")


def components(actions: ActionsConfig) -> list[str]:
    """Return those that the configuration trains with: a model knows no others."""
    names = varying(actions)
    if names:  # a corrupted source is ranked in a bank of jitters
        names += [corruption.name for corruption in corruptions_drawn(actions)]
    if actions.geometric:
        names += [name for name in ("flip", "rotation") if getattr(actions, f"{name}_probability") > 0]
        names += ["crop"] if actions.crop_scale[0] < 1 else []
    return names


def component_bank(
    actions: ActionsConfig,
    space: ActionSpace,
    image: Tensor,
    sample: int,
    count: int,
    *,
    seed: int = 0,
    vary: str | None = None,
) -> Bank:
    """Return the bank of ``image`` (S, S, 3) uint8, number ``sample``: all of the jitter, or what ``vary`` names alone.

    ``count``: items, except for flip (2) and rotation (4). Raise ValueError for an unknown name, or one of the
    geometric group that the actions leave out.
    """
    if vary is None or vary in JITTER:
        return make_bank(actions, space, sample, count, seed=seed, vary=vary)
    destructive = {corruption.name: corruption for corruption in space.corruptions}
    if vary in destructive:
        return _destroyed(actions, space, image, sample, count, seed, destructive[vary])
    if vary in GEOMETRIC and "geometric" in space.groups:
        return _moved(actions, space, image, sample, count, seed, vary)
    known = (*JITTER, *destructive, *(GEOMETRIC if "geometric" in space.groups else ()))
    raise ValueError(f"vary is {vary!r}; it must be one of {', '.join(known)}, or None")


def _destroyed(
    actions: ActionsConfig, space: ActionSpace, image: Tensor, sample: int, count: int, seed: int, what: Corruption
) -> Bank:
    """Return the jittered bank with a source that has lost its colour, its detail, or the order of its levels."""
    bank = make_bank(actions, space, sample, count, seed=seed)
    side = image.shape[0]
    drawn = draw_views(actions, seed, np.zeros(1, np.int64), np.array([sample]), np.array([[side, side]]))
    # Sampled as in training, but always applied: the midpoint if this sample's own value is "none".
    own = getattr(drawn, what.column)[0]
    value = own if what.done(own) else sum(strength_range(actions, what)) / 2
    rows = np.zeros(count, np.int64)
    destroyed = clean_views(side, 1).corrupted(what, value)
    told = dataclasses.replace(destroyed.take(rows), target=bank.jitter)
    return Bank(bank.jitter, space.encode(told), source=render(image[None], destroyed)[0][0])


def _moved(
    actions: ActionsConfig, space: ActionSpace, image: Tensor, sample: int, count: int, seed: int, what: str
) -> Bank:
    """Return the image mirrored, turned, or cropped, and the actions that lead there from the whole."""
    side = image.shape[0]
    if what == "rotation":
        # Only sources are turned: relative to a target turned by k, the image is a source turned by -k.
        views = clean_views(side, 4)
        turned = dataclasses.replace(views.source_geometry, rotation=-np.arange(4) % 4)
        told = dataclasses.replace(views, source_geometry=turned, shared_geometry=False)
        pictures = torch.stack([torch.rot90(image, turns, (0, 1)) for turns in range(4)])
        return Bank(views.target, space.encode(told), pictures=pictures)
    if what == "flip":
        views = clean_views(side, 2)
        target = dataclasses.replace(views.target_geometry, flip=np.array([False, True]))
    else:
        views = clean_views(side, count)
        target = dataclasses.replace(views.target_geometry, crop=_crops(actions, side, sample, count, seed))
    told = dataclasses.replace(views, target_geometry=target, shared_geometry=False)
    return Bank(views.target, space.encode(told), pictures=render(image[None], told)[1])


def _crops(actions: ActionsConfig, side: int, sample: int, count: int, seed: int) -> np.ndarray:
    """Return distinct boxes of a view of ``side`` pixels, sampled as in training: int64 (count, 4)."""
    size = np.full((4 * count, 2), side)
    # Epochs number this sample's crops. Small views have few boxes, so more are sampled than needed.
    drawn = draw_views(actions, seed, np.arange(4 * count), np.full(4 * count, sample), size).target_geometry.crop
    distinct = drawn[np.sort(np.unique(drawn, axis=0, return_index=True)[1])]
    if len(distinct) < count:
        raise UserError(
            f"actions: views of {side} pixels have {len(distinct)} distinct crops in {4 * count} samples, and the bank "
            f"needs {count}; lower eval.bank"
        )
    return distinct[:count]
