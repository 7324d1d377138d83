"""Measure what a setting gains: the training step with it against the same step without, in turn.

    python -m benchmarks.setting_gain train.compile=true --json FILE [--config vit_tiny_p4_32.yaml] [--threads 1]

Both start from the same weights and get the same batches of random pixels. Each batch has its own masks, so no two have
the same lengths. Their losses must agree before a time is reported; with another term in the loss (model.regularizer),
those of the first step without it; with another optimizer, those of the first step. Encoders of different architectures
(model.prefix_tokens, model.positions) have other losses, which must be finite; their times are also compared per token
and per FLOP.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from statistics import median
from typing import Any

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.benchmarks.step import TOLERANCE
from iwm_fast.config import Config, load_config
from iwm_fast.config.load import find_config
from iwm_fast.cost.step_time import image_flops
from iwm_fast.cost.tokens import tokens_of
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.step import Trainer
from iwm_fast.measure.device import only_rank
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.stats import ratio_of
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.measure.timing import clocked
from iwm_fast.models.compiled_regions import compilations
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["loss_difference", "measure_setting"]

_COUNTED = 512  # images whose tokens are counted
_SETTLED = 10  # steps after which nothing may compile any more
SIDES = ("without", "with")


def measure_setting(configs: dict[str, Config], ranks: Ranks, repeats: int) -> dict[str, Any]:
    """Return seconds of each timed step of both, ratios of their medians, and the graphs compiled before and after.

    configs: "without" and "with". Raise RuntimeError if a logged loss differs by more than the precision explains, or
    is not finite where architectures differ.
    """
    same = configs["without"].model.architecture == configs["with"].model.architecture
    follows = configs["without"].train.optimizer == configs["with"].train.optimizer
    steps = _SETTLED + repeats
    space = space_of(configs["with"].actions)
    trainers: dict[str, Trainer] = {}
    for side in SIDES:
        stream = synthetic_stream(configs[side], space, ranks.device, steps=steps)
        trainers[side] = prepare_trainer(configs[side], space, stream, ranks)
    before = settled = compilations()
    taken: dict[str, list[Any]] = {side: [] for side in SIDES}
    difference = 0.0
    for i in range(steps):
        if i == _SETTLED:
            settled = compilations()
        records: list[dict[str, Any] | None] = []
        for side in SIDES:
            taken[side].append(clocked(partial(_step, trainers[side], records), ranks.device))
        without, under = records
        if without is not None and under is not None and (i == 0 or (follows and without.keys() == under.keys())):
            found = loss_difference(_prediction(without), _prediction(under))
            difference = max(difference, found if same or not math.isfinite(found) else 0.0)
    # The optimizer carries rounding errors along: allow ten times the error of one step.
    if difference > 10 * TOLERANCE[configs["with"].train.precision]:
        raise RuntimeError(f"losses differ by up to {difference:.1e}: not timed")
    seconds = {side: [one.seconds for one in taken[side][_SETTLED:]] for side in SIDES}
    cpu = {side: [one.cpu_seconds for one in taken[side][_SETTLED:]] for side in SIDES}
    ratio, cpu_ratio = (ratio_of(times["without"], times["with"], paired=True) for times in (seconds, cpu))
    sizes = {side: _size_of(configs[side]) for side in SIDES}
    more = {name: sizes["with"][name] / sizes["without"][name] for name in sizes["with"]}
    return {
        "per_image": sizes,
        "time_ratio_per_token": 1 / ratio.value / more["tokens"],
        "time_ratio_per_flop": 1 / ratio.value / more["flops"],
        "images": configs["with"].train.global_batch,
        "sources_per_target": configs["with"].views.sources_per_target,
        "precision": configs["with"].train.precision,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "speed_ratio": ratio.value,
        "speed_ratio_interval": [ratio.low, ratio.high],
        "cpu_speed_ratio": cpu_ratio.value,
        "first_step_s": {side: taken[side][0].seconds for side in SIDES},
        "loss_difference": difference,
        "compilations": compilations() - before,
        "compilations_after_tenth_step": compilations() - settled,
    }


def _size_of(config: Config) -> dict[str, float]:
    """Mean tokens through both encoders and the predictor, and FLOPs, per image of the run's first ones."""
    drawn, model = tokens_of(config, _COUNTED), config.model
    target = model.grid**2 + model.target_architecture.prefix_tokens
    seen = drawn.context * model.history
    prefix = model.prefix_tokens * model.history
    source = seen + prefix + seen + (drawn.predicted if model.predictor.kind == "vit" else 0)
    return {
        "tokens": target + float(source.sum()) / drawn.images,
        "flops": image_flops(config, drawn).total / drawn.images,
    }


def loss_difference(without: float, under: float) -> float:
    """Return the difference of two losses over the first; infinite if either is not finite."""
    return abs(under / without - 1) if math.isfinite(under) and math.isfinite(without) and without else math.inf


def _prediction(record: dict[str, Any]) -> float:
    """The world model's own term."""
    value: float = record.get("loss_prediction", record["loss"])
    return value


def _step(trainer: Trainer, records: list[dict[str, Any] | None]) -> None:
    records.append(trainer.train_step())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="+", help="key.path=value to measure")
    parser.add_argument("--each", action="store_true", help="measure each setting alone, not all together")
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    parser.add_argument("--config", default="vit_tiny_p4_32.yaml")
    parser.add_argument("--common", nargs="*", default=[], help="key.path=value for both")
    parser.add_argument("--batch", type=int, default=32, help="global batch")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each")
    parser.add_argument("--threads", type=int, help="torch threads, on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    args = parser.parse_args()
    require_result(args.json)
    ranks = only_rank(args.device, args.threads)
    common = [f"train.global_batch={args.batch}", f"log.every_steps={_SETTLED}", *args.common]
    rows: list[dict[str, Any]] = []
    body = {"device": ranks.device.type, "threads": torch.get_num_threads(), "rows": rows}
    for setting in [[word] for word in args.setting] if args.each else [args.setting]:
        words = {"without": common, "with": [*common, *setting]}
        configs = {side: load_config(find_config(args.config), changes) for side, changes in words.items()}
        about = {"config": args.config, "setting": setting, "common": common}
        rows.append({**about, **measure_setting(configs, ranks, args.repeats)})
        if args.json != "-":
            write_result(args.json, "bench-settings", body)  # a stopped run keeps its rows
            _print(rows[-1])
    if args.json == "-":
        write_result("-", "bench-settings", body)
    return 0


def _print(row: dict[str, Any]) -> None:
    times = {side: f"{1e3 * median(values):.1f} ms" for side, values in row["seconds"].items()}
    low, high = row["speed_ratio_interval"]
    print(
        f"{' '.join(row['setting'])}: {times}: {row['speed_ratio']:.3f} ({low:.3f} to {high:.3f}) times as fast, "
        f"{row['time_ratio_per_token']:.3f} times the time per token; "
        f"{row['compilations']} graphs, {row['compilations_after_tenth_step']} of them after the tenth step",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.setting_gain", main))
