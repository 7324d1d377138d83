"""The baselines of `benchmarks.peers`, their FLOPs, and the rows of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks.adapters import answers, ijepa, ours, plain, timm_vit
from iwm_fast.benchmarks.adapters.ijepa import Checkout
from iwm_fast.benchmarks.adapters.inputs import Inputs, Masks, Shape, Side, draw_inputs, draw_masks
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.measure.stats import median_of, ratio_of
from iwm_fast.measure.timing import Clocked

__all__ = ["Peer", "batches", "counted_row", "line", "make_side", "peers", "ratios", "untimed_row"]

_COUNTED_BATCHES = 2  # batches of masks over which FLOPs are averaged


@dataclass(frozen=True)
class Peer:
    """How a baseline is built, counted and checked, and the conditioning of iwm-fast it is compared with.

    compiled: its step goes through torch.compile, which takes minutes.
    """

    ours: str
    make: Callable[[Shape, Sequence[Inputs], torch.device], Side]
    operations: Callable[[Shape, Sequence[Inputs]], list[int]]
    difference: Callable[[Shape, Inputs], float]
    compiled: bool = False


def peers(checkout: Checkout | None) -> dict[str, Peer]:
    """Return all available baselines by name."""

    def own_ijepa(compiled: bool) -> Peer:
        assert checkout is not None
        return Peer(
            "none",
            lambda shape, inputs, device: ijepa.Ijepa(checkout, shape, inputs, device, compiled=compiled),
            lambda shape, inputs: ijepa.operations(checkout, shape, inputs),
            lambda shape, inputs: answers.ijepa_difference(checkout, shape, inputs),
            compiled,
        )

    def own_plain(compiled: bool) -> Peer:
        return Peer(
            "feature",
            lambda shape, inputs, device: plain.Plain(shape, inputs, device, compiled=compiled),
            plain.operations,
            answers.plain_difference,
            compiled,
        )

    found = {} if checkout is None else {"ijepa": own_ijepa(False), "ijepa compile": own_ijepa(True)}
    found["timm"] = Peer("none", timm_vit.TimmStep, timm_vit.operations, answers.timm_difference)
    found |= {"plain": own_plain(False), "plain compile": own_plain(True)}
    return found | {"static shapes": _own_static("feature")}


def _own_static(conditioning: str) -> Peer:
    """iwm-fast's own step with train.static_shapes, compared with the one without."""
    return Peer(
        conditioning,
        lambda shape, inputs, device: ours.Ours(
            shape, inputs, Ranks(0, 1, 0, 1, device), conditioning, static=True
        ),
        lambda shape, inputs: ours.padded_operations(shape, inputs, conditioning),
        lambda shape, inputs: ours.padding_difference(shape, inputs, conditioning),
    )  # fmt: skip


def batches(shape: Shape, checkout: Checkout | None, count: int, seed: int) -> list[Inputs]:
    """Return batches with masks from ijepa's sampler, or from a like one without a checkout."""
    generator = np.random.default_rng(seed)
    masks: list[Masks] = (
        checkout.draw_masks(shape, count, seed)
        if checkout is not None
        else [draw_masks(shape, generator) for _ in range(count)]
    )
    return [draw_inputs(shape, one, ActionSpace().dim, seed + i) for i, one in enumerate(masks)]


def _on_meta(inputs: Inputs) -> Inputs:
    return Inputs(inputs.source.to("meta"), inputs.target.to("meta"), inputs.action.to("meta"), inputs.masks)


def make_side(name: str, shape: Shape, inputs: Sequence[Inputs], ranks: Ranks, chosen: Mapping[str, Peer]) -> Side:
    """Build iwm-fast's step with a conditioning ("iwm-fast none"), or a baseline's."""
    if name.startswith("iwm-fast "):
        return ours.Ours(shape, inputs, ranks, name.removeprefix("iwm-fast "))
    return chosen[name].make(shape, inputs, ranks.device)


def _tokens(inputs: Sequence[Inputs]) -> dict[str, float]:
    """Means over images: context patches before and after the cut, predicted patches without and with repeats."""
    masks = [one.masks for one in inputs]
    return {
        "context_drawn": float(np.mean([m.drawn.mean() for m in masks])),
        "context_kept": float(np.mean([m.context.shape[1] for m in masks])),
        "predicted": float(np.mean([len(u) for m in masks for u in m.unions()])),
        "predicted_with_repeats": float(np.mean([m.blocks.shape[0] * m.blocks.shape[2] for m in masks])),
    }


def untimed_row(shape: Shape, name: str) -> dict[str, Any]:
    """Return the fields that every row has, for a baseline that is not timed."""
    row = {"name": f"{shape.name} {name}", "peer": name, "shape": shape.name}
    return row | {"speed_ratio": None, "memory_ratio": None}


def counted_row(shape: Shape, name: str, peer: Peer, checkout: Checkout | None) -> dict[str, Any]:
    """Return a row with the FLOPs per image of both, the mean over several batches of masks; nothing is timed."""
    inputs = [_on_meta(one) for one in batches(shape, checkout, _COUNTED_BATCHES, seed=100)]
    pairs = ours.operations(shape, inputs, peer.ours)
    mine, formula = (sum(pair[i] for pair in pairs) / len(pairs) / shape.batch for i in range(2))
    theirs = sum(peer.operations(shape, inputs)) / len(inputs) / shape.batch
    return untimed_row(shape, name) | {
        "sizes": asdict(shape),
        "conditioning": peer.ours,
        "operations_ratio": mine / theirs,
        "operations_per_image": {"ours": mine, "ours_formula": formula, "peer": theirs},
        "tokens_per_image": _tokens(inputs),
    }


def ratios(mine: list[Clocked], peer: list[Clocked]) -> dict[str, Any]:
    """Return speed ratios with intervals, and the measurements behind them."""
    wall = [[one.seconds for one in side] for side in (mine, peer)]
    busy = [[one.cpu_seconds for one in side] for side in (mine, peer)]
    speed = ratio_of(wall[1], wall[0], paired=True)
    return {
        "speed_ratio": speed.value,
        "speed_ratio_interval": [speed.low, speed.high],
        "cpu_speed_ratio": ratio_of(busy[1], busy[0], paired=True).value,
        "median_seconds": {"ours": median_of(wall[0]).value, "peer": median_of(wall[1]).value},
        "seconds": {"ours": wall[0], "peer": wall[1]},
        "cpu_seconds": {"ours": busy[0], "peer": busy[1]},
    }


def line(row: Mapping[str, Any]) -> str:
    """Return the row as one printed line."""
    text = f"{row['name']:34}"
    if "operations_ratio" in row:
        text += f" operations × {row['operations_ratio']:.3f}"
    if "skipped" in row:
        return f"{text}  not timed: {row['skipped']}"
    if row["speed_ratio"] is not None:
        low, high = row["speed_ratio_interval"]
        text += f"  speed × {row['speed_ratio']:.2f} ({low:.2f} – {high:.2f})  memory × {row['memory_ratio']:.2f}"
        text += "" if row["masks"]["equal"] else "  MASKS DIFFER"
    return text
