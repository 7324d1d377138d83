"""iwm-fast's training step beside others', on the same shapes, batches and masks, in turn in one process.

    python -m benchmarks.peers --ijepa CHECKOUT --device cpu --json FILE

CHECKOUT is a clone of github.com/facebookresearch/ijepa of your own; without it the others are compared, which are
timm's parts in I-JEPA's step, and an Image World Model's step in plain PyTorch, eager and compiled.

Before anything is timed, each peer's networks are shown to compute what iwm-fast's do with the same weights, and a peer
whose answers differ is not timed. Rounds of one step of each side alternate their order; every step's time is kept.
speed_ratio is the peer's median time over ours (above 1: iwm-fast is faster), operations_ratio our counted operations
over the peer's (below 1: iwm-fast needs fewer), memory_ratio our peak memory above what was held before over the
peer's, each side in a process of its own (on a GPU: by its allocator).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iwm_fast.actions import ActionSpace
from iwm_fast.benchmarks.adapters import answers, ijepa, ours, plain, timm_vit
from iwm_fast.benchmarks.adapters.ijepa import Checkout
from iwm_fast.benchmarks.adapters.inputs import Inputs, Masks, Shape, Side, SideMissing, draw_inputs, draw_masks
from iwm_fast.benchmarks.memory import peak_of
from iwm_fast.benchmarks.stats import median_of, ratio_of
from iwm_fast.benchmarks.timing import Clocked, clocked
from iwm_fast.config.cores import usable_cores
from iwm_fast.engine.distributed import Ranks, start
from iwm_fast.errors import UserError
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.quiet import quiet_third_parties
from iwm_fast.results import write_result

__all__ = ["COUNTED", "TIMED", "compare_shape", "main"]

TIMED = (Shape("vit_tiny", 96, 8, 6, 192, 32), Shape("vit_tiny", 224, 16, 12, 384, 16))
# Operations alone, on the meta device.
COUNTED = (
    Shape("vit_base", 224, 16, 12, 384, 64),
    Shape("vit_base", 224, 16, 18, 384, 64),
    Shape("vit_large", 224, 16, 12, 384, 64),
)
# Timed where there is a GPU.
ON_GPU = (Shape("vit_base", 224, 16, 12, 384, 128), Shape("vit_large", 224, 16, 12, 384, 64))
_BATCHES = 2  # timed in turn
_COUNTED_BATCHES = 2  # draws of masks that operations are the mean of
_WARM_UP = {"cpu": 1, "cuda": 5}  # steps of each side
_MEMORY_STEPS = 2  # the optimizer's state is there from the second on
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Peer:
    """How a peer is made, counted and checked, and which of iwm-fast's conditionings it is compared with."""

    ours: str
    make: Callable[[Shape, Sequence[Inputs], torch.device], Side]
    operations: Callable[[Shape, Sequence[Inputs]], list[int]]
    difference: Callable[[Shape, Inputs], float]


def peers(checkout: Checkout | None) -> dict[str, Peer]:
    """All that can be compared with, by name."""

    def own_ijepa(compiled: bool) -> Peer:
        assert checkout is not None
        return Peer(
            "none",
            lambda shape, inputs, device: ijepa.Ijepa(checkout, shape, inputs, device, compiled=compiled),
            lambda shape, inputs: ijepa.operations(checkout, shape, inputs),
            lambda shape, inputs: answers.ijepa_difference(checkout, shape, inputs),
        )

    def own_plain(compiled: bool) -> Peer:
        return Peer(
            "feature",
            lambda shape, inputs, device: plain.Plain(shape, inputs, device, compiled=compiled),
            plain.operations,
            answers.plain_difference,
        )

    found = {} if checkout is None else {"ijepa": own_ijepa(False), "ijepa compile": own_ijepa(True)}
    found["timm"] = Peer("none", timm_vit.TimmStep, timm_vit.operations, answers.timm_difference)
    return found | {"plain": own_plain(False), "plain compile": own_plain(True)}


def batches(shape: Shape, checkout: Checkout | None, count: int, seed: int) -> list[Inputs]:
    """Batches with ijepa's own masks where there is a checkout of it, else with masks in its scheme."""
    generator = np.random.default_rng(seed)
    masks: list[Masks] = (
        checkout.draw_masks(shape, count, seed)
        if checkout is not None
        else [draw_masks(shape, generator) for _ in range(count)]
    )
    return [draw_inputs(shape, one, ActionSpace().dim, seed + i) for i, one in enumerate(masks)]


def _on_meta(inputs: Inputs) -> Inputs:
    return Inputs(inputs.source.to("meta"), inputs.target.to("meta"), inputs.action.to("meta"), inputs.masks)


def make_side(name: str, shape: Shape, inputs: Sequence[Inputs], ranks: Ranks, chosen: dict[str, Peer]) -> Side:
    """iwm-fast with a conditioning ("iwm-fast none"), or a peer."""
    if name.startswith("iwm-fast "):
        return ours.Ours(shape, inputs, ranks, name.removeprefix("iwm-fast "))
    return chosen[name].make(shape, inputs, ranks.device)


def time_in_turn(
    sides: dict[str, Side], device: torch.device, rounds: int, limit_s: float
) -> dict[str, list[Clocked]]:  # fmt: skip
    """Each side's steps; a round is one step of each, and every other round goes the other way.

    Three rounds, and no other begins after `limit_s` seconds.
    """
    taken: dict[str, list[Clocked]] = {name: [] for name in sides}
    end = time.monotonic() + limit_s
    for i in range(-_WARM_UP[device.type], rounds):
        if i >= _FEWEST_ROUNDS and time.monotonic() > end:
            break
        for name in list(sides) if i % 2 else list(reversed(sides)):
            one = clocked(sides[name].step, device)
            if i >= 0:
                taken[name].append(one)
    return taken


def _tokens(inputs: Sequence[Inputs]) -> dict[str, float]:
    """Means over images: context drawn, kept after the cut to the shortest, asked for, and asked with repeats."""
    masks = [one.masks for one in inputs]
    return {
        "context_drawn": float(np.mean([m.drawn.mean() for m in masks])),
        "context_kept": float(np.mean([m.context.shape[1] for m in masks])),
        "predicted": float(np.mean([len(u) for m in masks for u in m.unions()])),
        "predicted_with_repeats": float(np.mean([m.blocks.shape[0] * m.blocks.shape[2] for m in masks])),
    }


def _counted(shape: Shape, checkout: Checkout | None, chosen: dict[str, Peer]) -> dict[str, Any]:
    """Operations an image of each side, the mean over several draws of masks, and the tokens they are of."""
    inputs = [_on_meta(one) for one in batches(shape, checkout, _COUNTED_BATCHES, seed=100)]
    found: dict[str, Any] = {"tokens": _tokens(inputs), "formula": {}}
    for conditioning in sorted({peer.ours for peer in chosen.values()}):
        pairs = ours.operations(shape, inputs, conditioning)
        found[f"iwm-fast {conditioning}"] = sum(p[0] for p in pairs) / len(pairs) / shape.batch
        found["formula"][conditioning] = sum(p[1] for p in pairs) / len(pairs) / shape.batch
    for name, peer in chosen.items():
        found[name] = sum(peer.operations(shape, inputs)) / len(inputs) / shape.batch
    return found


def _alone(name: str, shape: Shape, args: argparse.Namespace, *_: object) -> dict[str, int]:
    """Peak memory of a side, in a process of its own."""
    command = [sys.executable, "-m", "iwm_fast.benchmarks.peers", "--alone", name, "--shape", shape.name]
    command += ["--device", args.device, "--threads", str(args.threads), "--json", "-"]
    command += ["--ijepa", str(args.ijepa)] if args.ijepa else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} alone: exit code {done.returncode}: {done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure_alone(
    name: str, shape: Shape, _: argparse.Namespace, checkout: Checkout | None, ranks: Ranks
) -> dict[str, int]:  # fmt: skip
    import deepspeed  # noqa: F401  (what is imported is held before, on every side alike)

    chosen = peers(checkout)
    inputs = batches(shape, checkout, _BATCHES, seed=0)

    def work() -> Side:
        side = make_side(name, shape, inputs, ranks, chosen)
        for _ in range(_MEMORY_STEPS):
            side.step()
        return side

    return {"peak_bytes": peak_of(work, ranks.device)}


def compare_shape(
    shape: Shape, args: argparse.Namespace, checkout: Checkout | None, ranks: Ranks, chosen: dict[str, Peer],
    say: Callable[[str], object],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each peer at one shape, timed, measured alone, and counted."""
    inputs = batches(shape, checkout, _BATCHES, seed=0)
    checked: dict[str, float] = {name: peer.difference(shape, inputs[0]) for name, peer in chosen.items()}
    right = {name: peer for name, peer in chosen.items() if checked[name] <= answers.TOLERANCE}
    for name in chosen.keys() - right.keys():
        say(f"  {name}: not timed, its answers are {checked[name]:.1e} away")
    names = [f"iwm-fast {c}" for c in sorted({peer.ours for peer in right.values()})] + list(right)
    counted = _counted(shape, checkout, right)
    # A GPU's allocator tells one side's memory from another's; a resident set is the whole process's.
    alone = _measure_alone if ranks.device.type == "cuda" else _alone
    memory = {name: alone(name, shape, args, checkout, ranks)["peak_bytes"] for name in names}
    sides = {name: make_side(name, shape, inputs, ranks, right) for name in names}
    before = os.getloadavg()
    taken = time_in_turn(sides, ranks.device, args.rounds, args.limit)
    rows = []
    for name, peer in right.items():
        mine, base = f"iwm-fast {peer.ours}", _row(shape, name, peer, counted)
        row = base | {
            "version": sides[name].version,
            "difference": checked[name],
            "memory_ratio": memory[mine] / memory[name],
            "peak_bytes": {"ours": memory[mine], "peer": memory[name]},
            "masks": {"ours": sides[mine].saw(), "peer": sides[name].saw()},
            "load_average": {"before": before, "after": os.getloadavg()},
            **_ratios(taken[mine], taken[name]),
        }
        row["masks"]["equal"] = row["masks"]["ours"] == row["masks"]["peer"]
        rows.append(row)
        say("  " + _line(row))
    return rows


def _row(shape: Shape, name: str, peer: Peer, counted: dict[str, Any]) -> dict[str, Any]:
    mine = counted[f"iwm-fast {peer.ours}"]
    return {
        "name": f"{shape.name} {name}",
        "peer": name,
        "shape": shape.name,
        "sizes": asdict(shape),
        "conditioning": peer.ours,
        "operations_ratio": mine / counted[name],
        "operations_per_image": {"ours": mine, "ours_formula": counted["formula"][peer.ours], "peer": counted[name]},
        "tokens_per_image": counted["tokens"],
        "speed_ratio": None,
        "memory_ratio": None,
    }


def _ratios(mine: list[Clocked], peer: list[Clocked]) -> dict[str, Any]:
    """Speeds with intervals, and all that they come from."""
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


def _line(row: dict[str, Any]) -> str:
    text = f"{row['peer']:14} operations × {row['operations_ratio']:.3f}"
    if row["speed_ratio"] is not None:
        low, high = row["speed_ratio_interval"]
        text += f"  speed × {row['speed_ratio']:.2f} ({low:.2f} – {high:.2f})  memory × {row['memory_ratio']:.2f}"
        text += "" if row["masks"]["equal"] else "  MASKS DIFFER"
    return text


def _chosen(names: Sequence[str] | None, checkout: Checkout | None) -> dict[str, Peer]:
    there = peers(checkout)
    unknown = set(names or ()) - there.keys()
    if unknown:
        raise UserError(f"--peers: {', '.join(sorted(unknown))}: not here; there are {', '.join(there)}")
    chosen = {name: peer for name, peer in there.items() if not names or name in names}
    if "timm" in chosen:
        try:
            timm_vit.import_timm()
        except SideMissing as reason:
            print(f"timm: left out: {reason}", file=sys.stderr)
            del chosen["timm"]
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ijepa", type=Path, metavar="CHECKOUT", help="a clone of facebookresearch/ijepa")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", required=True, metavar="FILE", help="- for standard output")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which no round of a shape begins")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of each side, on a CPU")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="default: all that are there")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="in this order; default: all")
    parser.add_argument("--alone", metavar="SIDE", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _parser().parse_args(argv)
    require_result(args.json)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print("peers: torch sees no GPU: use --device cpu", file=sys.stderr)
        return 2
    quiet_third_parties()
    torch.set_num_threads(args.threads)
    ranks = start(alone=True)
    timed = TIMED if args.device == "cpu" else (*TIMED, *ON_GPU)
    there = {shape.name: shape for shape in (*COUNTED, *timed)}
    unknown = set(args.shape or ()) - there.keys()
    if unknown:
        print(f"peers: --shape: {', '.join(sorted(unknown))}: there are {', '.join(there)}", file=sys.stderr)
        return 2
    shapes = [there[name] for name in args.shape or there]
    rows: list[dict[str, Any]] = []
    body = {"device": args.device, "threads": args.threads, "rounds": args.rounds, "rows": rows}
    try:
        checkout = Checkout(args.ijepa) if args.ijepa else None
        if args.alone:
            print(json.dumps(_measure_alone(args.alone, shapes[0], args, checkout, ranks)))
            return 0
        chosen = _chosen(args.peers, checkout)
        for shape in shapes:
            print(f"{shape.name}, batch {shape.batch}", file=sys.stderr, flush=True)
            if shape in timed:
                rows += compare_shape(shape, args, checkout, ranks, chosen, _say)
            else:
                counted = _counted(shape, checkout, chosen)
                found = [_row(shape, name, peer, counted) for name, peer in chosen.items() if "compile" not in name]
                for row in found:
                    _say("  " + _line(row))
                rows += found
            if args.json != "-":
                write_result(args.json, "peers", body)  # after each shape: what is measured is kept
    except UserError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    finally:
        if args.json == "-" and rows:
            write_result("-", "peers", body)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.peers", main))
