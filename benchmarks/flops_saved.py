r"""Count the FLOPs that the step saves: per image, without each saving in turn, and what the inexact savings lose.

    python -m benchmarks.flops_saved --json FILE [--configs vit_base_p16_224_equi.yaml ...] [--quality SWEEP.json]

FLOPs of matmuls, forward and backward (`iwm_fast.cost.flops`), are counted for masks as training samples them; nothing
is timed. Most savings compute the same numbers with fewer FLOPs, and tests/engine/test_plain_path.py asserts that. The
inexact ones, several sources per target and the target in fp8, are trained as variants by `benchmarks.sweep`; add that
file with `--quality`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.external import action_dim
from iwm_fast.benchmarks.sweep import interval, public
from iwm_fast.config import Config, load_config
from iwm_fast.config.load import find_config
from iwm_fast.cost.flops import StepFlops, step_flops
from iwm_fast.cost.tokens import tokens_of
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["SOURCES", "count_savings"]

CONFIGS = ("vit_base_p16_224_equi.yaml", "vit_base_p16_224_inv.yaml", "vit_large_p16_224.yaml", "vit_tiny_p4_32.yaml")
SOURCES = (2, 4)
# Images: the mean of 2,048 stands for all. A padded batch pads to its longest; 128 is a usual batch of a rank.
_IMAGES, _PADDED_TOGETHER = 2048, 128
FIGURES = ("mrr", "mrr_cosine", "knn", "linear", "loss_last", "rank_me")

Ints = NDArray[np.int64]


def _with(config: Config, section: str, **changes: int) -> Config:
    """Return the configuration with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def _padded(lengths: Ints) -> Ints:
    """Raise every length to the longest in its batch."""
    batches = lengths.reshape(-1, _PADDED_TOGETHER)
    return np.repeat(batches.max(axis=1), _PADDED_TOGETHER)


def _predictor(flops: StepFlops) -> int:
    return flops.predictor_forward + flops.predictor_backward


def count_savings(config: Config, images: int = _IMAGES) -> dict[str, Any]:
    """Return FLOPs per image: as shipped, by part, without each exact saving, and with K sources per target.

    An image has views.sources_per_target sources, except in the last, which are counted per source. `images` is a
    multiple of 128. Raise ValueError for the mlp predictor, which predicts at the patches that it is given.
    """
    model, actions = config.model, action_dim(config.actions)
    if model.predictor.kind != "vit":
        raise ValueError(f"model.predictor.kind is {model.predictor.kind}; savings are counted for vit")
    drawn = tokens_of(config, images)
    context, target = drawn.context, drawn.predicted
    shipped = step_flops(model, actions, context, target, drawn.sources)

    pixels = 3 * model.patch**2
    hidden = int((model.grid**2 - context).sum())  # source patches that the encoder does not see
    # Forward, and the weight's gradient; pixels need none.
    embedded_all = 2 * 2 * hidden * pixels * model.encoder_shape.width

    # One block's sizes do not depend on how many are sampled.
    one_block, asked_by_block = _with(config, "masks", target_blocks=1), 0
    for block in range(config.masks.target_blocks):
        alone = tokens_of(_with(one_block, "train", seed=config.train.seed + block + 1), images).predicted
        asked_by_block += _predictor(step_flops(model, actions, context, alone, drawn.sources))

    everywhere = np.full_like(target, model.grid**2)
    whole_target = step_flops(model, actions, context, everywhere, drawn.sources).target_forward

    width = model.predictor.width
    # Per token: the projection and the MLP.
    after_attention = 2 * width * width + 4 * width * round(width * model.predictor.mlp_ratio)
    whole_predictor = 3 * int(context.sum()) * after_attention

    padded = step_flops(model, actions, _padded(context), _padded(target), drawn.sources)
    padded_total = padded.total - padded.target_forward + shipped.target_forward
    without = {
        "all patches embedded, then dropped": shipped.total + embedded_all,
        "the predictor asked once a target block": shipped.total - _predictor(shipped) + asked_by_block,
        "the target's last block whole": shipped.total - shipped.target_forward + whole_target,
        "the predictor's last block whole": shipped.total + whole_predictor,
        "padded to the longest of 128 images": padded_total,
    }
    several = {}
    for sources in SOURCES:
        shared = tokens_of(_with(config, "views", sources_per_target=sources), images)
        operations = step_flops(model, actions, shared.context, shared.predicted, sources).total
        several[str(sources)] = operations / (images * sources)
    return {
        "shipped": shipped.total / images,
        "target_forward": shipped.target_forward / images,
        "context": (shipped.context_forward + shipped.context_backward) / images,
        "predictor": _predictor(shipped) / images,
        "without": {name: whole / images for name, whole in without.items()},
        "sources_per_target": several,
    }


def _quality(arms_file: Path) -> dict[str, Any]:
    """Return each variant's metrics from a file of `benchmarks.sweep`: the mean, its 95 % interval, and each seed's."""
    document = json.loads(arms_file.read_text(encoding="utf-8"))
    arms = []
    for arm in document["arms"]:
        found = {name: [run["evaluation"][name] for run in arm["runs"]] for name in FIGURES}
        figures = {name: interval(values) | {"seeds": values} for name, values in found.items()}
        arms.append({"name": arm["name"], "overrides": arm["overrides"], "figures": figures})
    return {"config": document["config"], "common": document["common"], "file": arms_file.name, "arms": arms}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--quality", type=Path, help="result of benchmarks.sweep with the inexact savings as variants")
    args = parser.parse_args()
    require_result(args.json)
    rows = [{"config": name, **count_savings(load_config(find_config(name), []))} for name in args.configs]
    body: dict[str, Any] = {"rows": rows, "command": public(sys.argv[1:])}
    if args.quality:
        body["quality"] = _quality(args.quality)
    write_result(args.json, "savings", body)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.flops_saved", main))
