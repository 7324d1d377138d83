"""Count the activations that a step saves for its backward pass, by part, against facebookresearch/ijepa, and estimate
the largest batch that fits in memory.

    python -m benchmarks.activations --ijepa CHECKOUT --json FILE

Nothing is computed: networks and batches are on PyTorch's meta device, and autograd's hooks see what is saved. Both
implementations run eagerly in bf16, ijepa under CUDA's autocast rules (`iwm_fast.measure.autocast`), on ijepa's masks,
cut to the batch's shortest context, and without an action.

Counted: saved activations, each storage once, and what lasts from step to step: weights, gradients, AdamW's moments,
the EMA, and the rounded weights that autocast caches within a step. Not counted, in either: the batch's pixels,
temporary memory of the backward pass, workspaces of libraries and collectives, and the allocator's fragmentation. A
largest batch here is therefore an upper bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks.adapters import ijepa
from iwm_fast.benchmarks.adapters.ijepa import Checkout
from iwm_fast.benchmarks.adapters.inputs import Inputs, Masks, Shape, draw_inputs
from iwm_fast.benchmarks.counting.kept_count import counted_activations
from iwm_fast.benchmarks.peers import COUNTED, TIMED
from iwm_fast.benchmarks.scaling import BATCHES, fit_line
from iwm_fast.config import Config, load_config
from iwm_fast.config.load import find_config
from iwm_fast.cost.activations import KeptBytes, activations
from iwm_fast.cost.memory import layout_of, state_memory
from iwm_fast.cost.tokens import Tokens, tokens_of
from iwm_fast.errors import UserError
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["compare_shape", "count_batches", "main"]

_IMAGES = 64  # of a counted batch
_DEVICES = (16, 80, 141)  # GB
_CONFIG = "vit_tiny_p8_96.yaml"  # whose batches of all sizes are counted


def _per_image(parts: KeptBytes, images: int) -> dict[str, float]:
    return {part: size / images for part, size in asdict(parts).items()}


def _ours(shape: Shape, masks: Masks) -> dict[str, Any]:
    config, sets = shape.config("none", bf16=True), masks.patch_sets()
    tokens = Tokens(sets.context_lengths, sets.target_lengths)
    formula, counted = activations(config, tokens).parts, counted_activations(config, tokens, "meta")
    return {
        "per_image": formula.total / shape.batch,
        "parts_per_image": _per_image(formula, shape.batch),
        "counted_per_image": counted.total / shape.batch,
        "counted_parts_per_image": _per_image(counted, shape.batch),
        "plain_operators_per_image": activations(config, tokens, hidden_kept=True).kept / shape.batch,
        "state": state_memory(config, layout_of(config), world=1).state,
    }


def _half(inputs: Inputs, images: int) -> Inputs:
    masks = inputs.masks
    cut = Masks(masks.context[:images], masks.blocks[:, :images], masks.drawn[:images])
    return Inputs(inputs.source[:images], inputs.target[:images], inputs.action[:images], cut)


def _ijepa(checkout: Checkout, shape: Shape, masks: Masks) -> dict[str, Any]:
    """Separate what each image adds from what every batch has, by counting two batch sizes."""
    drawn = draw_inputs(shape, masks, ActionSpace().dim, seed=0)
    whole = Inputs(drawn.source.to("meta"), drawn.target.to("meta"), drawn.action.to("meta"), masks)
    images = shape.batch // 2
    (all_of_it, encoder, predictor), (half, _, _) = (
        ijepa.kept(checkout, shape, inputs) for inputs in (whole, _half(whole, images))
    )
    parts = {p: (size - getattr(half, p)) / images for p, size in asdict(all_of_it).items()}
    target = sum(p.numel() for p in encoder.parameters())
    trained = sum(p.numel() for m in (encoder, predictor) for p in m.parameters() if p.requires_grad)
    return {
        "per_image": sum(parts.values()),
        "parts_per_image": parts,
        "rounded_weights": all_of_it.total - shape.batch * sum(parts.values()),
        # In fp32: weights, gradients and two moments; the EMA.
        "state": 16 * trained + 4 * target,
    }


def compare_shape(checkout: Checkout, shape: Shape, seed: int = 100) -> dict[str, Any]:
    """Return one row: bytes per image by part of either implementation, state, and the largest batches."""
    shape = replace(shape, batch=_IMAGES)
    (masks,) = checkout.draw_masks(shape, 1, seed)
    mine, theirs = _ours(shape, masks), _ijepa(checkout, shape, masks)
    largest = {}
    for size in _DEVICES:
        left = (size * 10**9 - mine["state"], size * 10**9 - theirs["state"] - theirs["rounded_weights"])
        fits = [max(0, int(room // side["per_image"])) for room, side in zip(left, (mine, theirs), strict=True)]
        largest[f"{size} GB"] = {"ours": fits[0], "peer": fits[1], "ratio": fits[0] / fits[1] if fits[1] else None}
    return {
        "name": shape.name,
        "sizes": asdict(shape),
        "tokens_per_image": {
            "context": masks.context.shape[1],
            "predicted": float(np.mean([len(u) for u in masks.unions()])),
            "predicted_with_repeats": masks.blocks.shape[0] * masks.blocks.shape[2],
        },
        "ours": mine,
        "peer": theirs,
        "kept_ratio": mine["per_image"] / theirs["per_image"],
        "largest_batch": largest,
    }


def count_batches(config: Config, sizes: Sequence[int] = BATCHES) -> dict[str, Any]:
    """Return the counted bytes of batches of each size, and the line fitted through them.

    The images of the largest batch are divided into batches of each size, because images differ in their masks and
    single ones would add noise.
    """
    images = max(sizes)
    drawn = tokens_of(config, images)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        kept = [counted_activations(config, drawn.part(first, size), "meta").total for first in range(0, images, size)]
        rows.append({"images": size, "kept_bytes": kept, "mean": float(np.mean(kept))})
    return {"rows": rows, **fit_line([r["images"] for r in rows], [r["mean"] for r in rows])}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ijepa", type=Path, required=True, metavar="CHECKOUT", help="clone of facebookresearch/ijepa")
    parser.add_argument("--json", required=True, metavar="FILE", help="file to write; - for standard output")
    args = parser.parse_args(argv)
    require_result(args.json)
    try:
        checkout = Checkout(args.ijepa)
        rows = []
        for shape in (*COUNTED, *TIMED):
            rows.append(compare_shape(checkout, shape))
            print(f"{shape.name}: saved activations × {rows[-1]['kept_ratio']:.3f}", file=sys.stderr, flush=True)
            if args.json != "-":
                write_result(args.json, "activations", {"peer": "ijepa", "rows": rows})  # a stopped run keeps its rows
        config = load_config(find_config(_CONFIG), ["zero.stage=1", "train.precision=bf16"])
        body = {
            "peer": "ijepa",
            "peer_version": checkout.version,
            "images": _IMAGES,
            "rows": rows,
            "batches": {"config": _CONFIG, **count_batches(config)},
        }
        write_result(args.json, "activations", body)
    except UserError as error:
        print(f"activations: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.activations", main))
