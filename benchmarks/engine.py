"""Measure the engine's overhead: its step against a bare PyTorch loop over the same model, batches and optimizer.

    python -m benchmarks.engine --json FILE [--config vit_tiny_p4_32.yaml] [--batch 32] [--ranks 1 2] [--stages 0 1]

The bare loop is forward, backward, fused AdamW and an in-place EMA update, with torch's DistributedDataParallel on
several ranks. Both take the same batches from memory, in turn, so only the code around the model differs. Nothing is
timed before the weights agree after a few steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from iwm_fast.actions.external import space_of
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config, load_config
from iwm_fast.config.load import find_config
from iwm_fast.engine.distributed.ranks import Ranks, leave, start
from iwm_fast.engine.micro_batch import Packer
from iwm_fast.engine.schedules import Schedules
from iwm_fast.measure.harness import MANY_STEPS, prepare_trainer
from iwm_fast.measure.synthetic import BatchStream, synthetic_stream
from iwm_fast.measure.timing import spread
from iwm_fast.models.decay import decayed_parameters
from iwm_fast.models.iwm import IWM
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["measure"]

_CHECKED_STEPS = 3
# Of the weights' norm. fp32 sums in another order differ, and AdamW's first steps have the same size whatever the
# gradient's.
_AGREE = 1e-4


@dataclass(frozen=True)
class Side:
    """One training loop: its step, and its fp32 weights by name and offset, as far as this rank holds them."""

    step: Callable[[], object]
    weights: Callable[[], dict[tuple[str, int], Tensor]]


def _engine_side(config: Config, space: ActionSpace, stream: BatchStream, ranks: Ranks) -> Side:
    """The trainer's step; it logs the first step only, because a real run logs few."""
    trainer = prepare_trainer(config, space, stream, ranks)
    return Side(trainer.train_step, lambda: {(s.name, s.start): s.weight for s in trainer.zero.shards})


def _bare_side(config: Config, space: ActionSpace, stream: BatchStream, ranks: Ranks) -> Side:
    torch.manual_seed(config.train.seed)
    model = IWM(config.model, space.dim).to(ranks.device)
    trained: nn.Module = model
    if ranks.world > 1:
        trained = nn.parallel.DistributedDataParallel(model)
    own, decays = [(n, p) for n, p in model.named_parameters() if p.requires_grad], decayed_parameters(model)
    decayed, plain = [p for n, p in own if decays[n]], [p for n, p in own if not decays[n]]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.train.betas, fused=True)
    assert model.target_encoder is not None
    average: list[torch.Tensor] = list(model.target_encoder.parameters())
    online: list[torch.Tensor] = list(model.encoder.parameters())
    pack = Packer(config, stream.micro_batch, model.predicts, ranks.device, ranks.world)
    schedules, endless, count = Schedules(config.train, MANY_STEPS), iter(stream), itertools.count()

    def step() -> None:
        i, batch = next(count), next(endless)
        for group in optimizer.param_groups:
            group["lr"] = schedules.lr(i)
        optimizer.param_groups[0]["weight_decay"] = schedules.weight_decay(i)
        optimizer.zero_grad()
        trained(*pack(batch, i).arguments).loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, online, 1.0 - schedules.ema(i))

    return Side(step, lambda: {(name, 0): p.detach().flatten() for name, p in own})


def _require_agreement(engine: Side, bare: Side, stage: int) -> None:
    """Raise RuntimeError unless the engine's weights, sharded or not, are those of the bare loop."""
    whole = {name: weight for (name, _), weight in bare.weights().items()}
    parts = [(w, whole[name][start : start + w.numel()]) for (name, start), w in engine.weights().items()]
    ours, theirs = (torch.cat(side) for side in zip(*parts, strict=True))
    distance = float((ours - theirs).norm() / theirs.norm())
    if not distance <= _AGREE:
        raise RuntimeError(
            f"stage {stage}: weights differ by {distance:.1e} of their norm after {_CHECKED_STEPS} steps"
        )


def measure(config: Config, stages: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return one row per ZeRO stage, on this rank: seconds of every step of both loops, and the median ratio."""
    ranks = start()
    space = space_of(config.actions)
    rows = []
    for stage in stages:
        staged = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})
        stream = synthetic_stream(staged, space, ranks.device, rank=ranks.rank, world=ranks.world)
        sides = {
            "bare": _bare_side(staged, space, stream, ranks),
            "engine": _engine_side(staged, space, stream, ranks),
        }
        for _ in range(_CHECKED_STEPS):
            for side in sides.values():
                side.step()
        _require_agreement(sides["engine"], sides["bare"], stage)
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                begin = time.perf_counter()
                side.step()
                samples[name].append(time.perf_counter() - begin)
        ratios = [e / b for e, b in zip(samples["engine"], samples["bare"], strict=True)]
        rows.append(
            {
                "ranks": ranks.world, "stage": stage, "batch": config.train.global_batch,
                "sources_per_target": config.views.sources_per_target, "seconds": samples,
                "overhead": median(samples["engine"]) / median(samples["bare"]) - 1, "ratio": spread(ratios),
            }
        )  # fmt: skip
    return rows


def _launch(ranks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure on `ranks` processes of this host; return rank 0's rows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "benchmarks.engine", "--rows", str(rows), "--config", args.config]
        command += ["--batch", str(args.batch), "--repeats", str(args.repeats), "--stages", *map(str, args.stages)]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        found: list[dict[str, Any]] = json.loads(rows.read_text())
        return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write; default: print the rows only")
    parser.add_argument("--config", default="vit_tiny_p4_32.yaml")
    parser.add_argument("--batch", type=int, default=32, help="global batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1], choices=[0, 1, 2, 3])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json:
        require_result(args.json)
    if args.rows is not None:
        settings = [f"train.global_batch={args.batch}", "log.every_steps=1000000", "train.precision=fp32"]
        rows = measure(load_config(find_config(args.config), settings), args.stages, args.repeats)
        if os.environ["RANK"] == "0":
            args.rows.write_text(json.dumps(rows))
        leave()
        return 0
    found = [row for ranks in args.ranks for row in _launch(ranks, args)]
    if args.json:
        write_result(args.json, "bench-engine", {"rows": found, "command": sys.argv[1:]})
    for row in found:
        whole = {name: f"{median(values) * 1000:.1f} ms" for name, values in row["seconds"].items()}
        print(f"{row['ranks']} ranks, stage {row['stage']}: {whole}, overhead {100 * row['overhead']:+.1f}%")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.engine", main))
