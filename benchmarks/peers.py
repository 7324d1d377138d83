"""Time iwm-fast's training step against baselines on the same shapes, batches and masks, in turn in one process.

    python -m benchmarks.peers --ijepa CHECKOUT --device cpu --json FILE

Baselines: facebookresearch/ijepa (CHECKOUT is your clone; left out without it), timm's parts in I-JEPA's step, and a
reference implementation of an Image World Model's step in plain PyTorch, each eager and compiled.

Before anything is timed, each baseline's networks must compute what iwm-fast's do with the same weights; a baseline
whose results differ is not timed. Each round is one step of each, in alternating order; every step's time is recorded.
speed_ratio is the baseline's median time over iwm-fast's (above 1: iwm-fast is faster), operations_ratio iwm-fast's
counted FLOPs over the baseline's (below 1: iwm-fast needs fewer), memory_ratio iwm-fast's peak memory over the
baseline's, without what was allocated before, each in a process of its own (on a GPU: by its allocator).

Rows are written to FILE as they are measured: eager baselines at every shape, then compiled ones, each against iwm-fast
in a process of its own. A row that --until leaves no time for, or that does not compile, records the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from iwm_fast.benchmarks.adapters import answers, timm_vit
from iwm_fast.benchmarks.adapters.ijepa import Checkout
from iwm_fast.benchmarks.adapters.inputs import Inputs, Shape, Side, SideMissing
from iwm_fast.benchmarks.adapters.peer_rows import (
    Peer,
    batches,
    counted_row,
    line,
    make_side,
    peers,
    ratios,
    untimed_row,
)
from iwm_fast.benchmarks.baselines.skipped import in_a_line
from iwm_fast.engine.distributed.ranks import Ranks, start
from iwm_fast.environment import usable_cores
from iwm_fast.errors import UserError
from iwm_fast.log_filters import quiet_third_parties
from iwm_fast.measure.memory import peak_of
from iwm_fast.measure.timing import Clocked, clocked
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["COUNTED", "TIMED", "Comparison", "compare", "main"]

TIMED = (Shape("vit_tiny", 96, 8, 6, 192, 32), Shape("vit_tiny", 224, 16, 12, 384, 16))
# FLOPs only, on the meta device.
COUNTED = (
    Shape("vit_base", 224, 16, 12, 384, 64),
    Shape("vit_base", 224, 16, 18, 384, 64),
    Shape("vit_large", 224, 16, 12, 384, 64),
)
# Timed on a GPU.
ON_GPU = (Shape("vit_base", 224, 16, 12, 384, 128), Shape("vit_large", 224, 16, 12, 384, 64))
_BATCHES = 2  # timed in turn
_WARM_UP = {"cpu": 1, "cuda": 5}  # steps of each
_MEMORY_STEPS = 2  # the optimizer's state exists from the second step on
_FEWEST_ROUNDS = 3
_ERROR = re.compile(r"\w*(Error|Exception|Killed)\b.*:")


def time_in_turn(
    sides: dict[str, Side], device: torch.device, rounds: int, limit_s: float
) -> dict[str, list[Clocked]]:  # fmt: skip
    """Time the steps of all; a round is one step of each, in alternating order.

    At least three rounds; none starts after `limit_s` seconds.
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


@dataclass
class Comparison:
    """The comparisons of one run; what several baselines are compared with is measured alone once."""

    args: argparse.Namespace
    checkout: Checkout | None
    ranks: Ranks
    end: float
    alone: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until nothing more may start."""
        return self.end - time.monotonic()

    def row(self, shape: Shape, name: str, peer: Peer) -> dict[str, Any]:
        """Time a baseline at a shape against iwm-fast, in turn in this process."""
        row = counted_row(shape, name, peer, self.checkout)
        inputs = batches(shape, self.checkout, _BATCHES, seed=0)
        row["difference"] = peer.difference(shape, inputs[0])
        if not row["difference"] <= answers.TOLERANCE:  # also catches NaN
            return row | {"skipped": f"wrong result: {row['difference']:.1e} from iwm-fast's"}
        mine = f"iwm-fast {peer.ours}"
        sides: dict[str, Side] = {}
        memory = {side: self._begun(side, shape, inputs, sides, {name: peer}) for side in (mine, name)}
        before = os.getloadavg()
        taken = time_in_turn(sides, self.ranks.device, self.args.rounds, self.args.limit)
        saw = {"ours": sides[mine].saw(), "peer": sides[name].saw()}
        return row | {
            "version": sides[name].version,
            "memory_ratio": memory[mine] / memory[name],
            "peak_bytes": {"ours": memory[mine], "peer": memory[name]},
            "masks": saw | {"equal": saw["ours"] == saw["peer"]},
            "load_average": {"before": before, "after": os.getloadavg()},
            **ratios(taken[mine], taken[name]),
        }

    def _begun(
        self, name: str, shape: Shape, inputs: Sequence[Inputs], sides: dict[str, Side], chosen: Mapping[str, Peer]
    ) -> int:
        """Build a step into ``sides``; return its peak memory in bytes."""

        def begin() -> None:
            sides[name] = make_side(name, shape, inputs, self.ranks, chosen)

        def work() -> None:
            begin()
            for _ in range(_MEMORY_STEPS):
                sides[name].step()

        # A GPU's allocator separates the two; the resident set is the whole process's.
        if self.ranks.device.type == "cuda":
            import deepspeed  # noqa: F401  (what is imported is held before, on every side alike)

            return peak_of(work, self.ranks.device)
        key = (shape.name, name)
        if key not in self.alone:
            self.alone[key] = self._alone(name, shape)
        begin()
        return self.alone[key]

    def _again(self, shape: Shape, *words: str) -> subprocess.CompletedProcess[str]:
        """Start this program again for one shape, in a process of its own, for as long as there is time."""
        command = [sys.executable, "-m", "iwm_fast.benchmarks.peers", "--shape", shape.name, *words]
        command += ["--device", self.args.device, "--threads", str(self.args.threads)]
        command += ["--ijepa", str(self.args.ijepa)] if self.args.ijepa else []
        left = None if math.isinf(self.left) else max(self.left, 0.0)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)

    def _alone(self, name: str, shape: Shape) -> int:
        """Return the peak memory of one step in a process of its own."""
        done = self._again(shape, "--alone", name, "--json", "-")
        if done.returncode:
            raise RuntimeError(f"{name} alone: exit code {done.returncode}: {done.stderr[-3000:]}")
        return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])

    def apart(self, shape: Shape, name: str) -> dict[str, Any]:
        """Return a baseline's row from a process of its own: compiling may exceed the time left, or fail."""
        row = untimed_row(shape, name)
        gc.collect()  # engines of earlier rows are in reference cycles
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        args, begin = self.args, time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "row.json"
            words = ["--peers", name, "--here", "--json", str(file), "--rounds", str(args.rounds)]
            try:
                # Two seconds for the process to end by itself.
                until = [] if math.isinf(self.left) else ["--until", f"{max(self.left - 2, 0):.0f}"]
                done = self._again(shape, *words, "--limit", str(args.limit), *until)
            except subprocess.TimeoutExpired:
                taken = time.monotonic() - begin
                return row | {"skipped": f"not finished after {taken:.0f} s; raise --until ({args.until:.0f})"}
            if done.returncode:
                said = [text for text in done.stderr.splitlines() if _ERROR.search(text)] or done.stderr.splitlines()
                return row | {"skipped": f"exit code {done.returncode}: {' '.join(said[-1:])[:300]}"}
            found: dict[str, Any] = json.loads(file.read_text())["rows"][0]
            return found


def _measure_alone(name: str, shape: Shape, checkout: Checkout | None, ranks: Ranks) -> dict[str, int]:
    import deepspeed  # noqa: F401  (what is imported is held before, on every side alike)

    chosen = peers(checkout)
    inputs = batches(shape, checkout, _BATCHES, seed=0)

    def work() -> Side:
        side = make_side(name, shape, inputs, ranks, chosen)
        for _ in range(_MEMORY_STEPS):
            side.step()
        return side

    return {"peak_bytes": peak_of(work, ranks.device)}


def compare(
    shapes: Sequence[Shape], timed: Collection[Shape], chosen: Mapping[str, Peer], comparison: Comparison
) -> Iterator[dict[str, Any]]:
    """Yield a row for each baseline at each shape when it is measured: FLOPs of the untimed ones, then the eager
    baselines, then the compiled ones, each in a process of its own.
    """
    in_turn = [(shape, name, peer) for shape in shapes for name, peer in chosen.items()]
    longest = 0.0
    for shape, name, peer in sorted(in_turn, key=lambda one: one[2].compiled):
        apart = peer.compiled and not comparison.args.here
        if shape not in timed:
            if not peer.compiled:  # a compiled one has the FLOPs of its eager form
                yield counted_row(shape, name, peer, comparison.checkout)
        elif comparison.left <= (0.0 if apart else 2 * longest):  # a larger shape takes longer
            left = f"{max(comparison.left, 0.0):.0f} s were left of --until {comparison.args.until:.0f}"
            took = f", and another took {longest:.0f} s" if longest else ""
            yield untimed_row(shape, name) | {"skipped": f"not started: {left}{took}"}
        elif apart:
            yield comparison.apart(shape, name)
        else:
            begin = time.monotonic()
            try:
                row = comparison.row(shape, name, peer)
            except (RuntimeError, UserError) as error:  # out of memory, or a loss that is not finite
                row = untimed_row(shape, name) | {"skipped": f"failed: {in_a_line(error, 300)}"}
            longest = max(longest, time.monotonic() - begin)
            yield row


def _chosen(names: Sequence[str] | None, checkout: Checkout | None) -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the selected baselines that are available, and why others are not."""
    there = peers(checkout)
    unknown = set(names or ()) - there.keys()
    if unknown:
        raise UserError(f"--peers {', '.join(sorted(unknown))}: no such baseline; choose from {', '.join(there)}")
    chosen = {name: peer for name, peer in there.items() if not names or name in names}
    missing = {} if checkout or names else {"ijepa": "give --ijepa CHECKOUT"}
    if "timm" in chosen:
        try:
            timm_vit.import_timm()
        except SideMissing as reason:
            missing["timm"] = str(reason)
            del chosen["timm"]
    return chosen, missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ijepa", type=Path, metavar="CHECKOUT", help="clone of facebookresearch/ijepa")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", required=True, metavar="FILE", help="file to write; - for standard output")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each implementation")
    parser.add_argument("--limit", type=float, default=600.0, help="start no round of a shape after this many seconds")
    parser.add_argument("--until", type=float, default=math.inf, help="start no row after this many seconds")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads on a CPU")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="time these baselines; default: all available")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="time these shapes, in this order; default: all")
    parser.add_argument("--alone", metavar="SIDE", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; return 1 if a baseline failed."""
    begin = time.monotonic()
    args = _parser().parse_args(argv)
    require_result(args.json)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print("peers: torch sees no GPU; give --device cpu", file=sys.stderr)
        return 2
    quiet_third_parties()
    torch.set_num_threads(args.threads)
    ranks = start(alone=True)
    timed = TIMED if args.device == "cpu" else (*TIMED, *ON_GPU)
    there = {shape.name: shape for shape in (*COUNTED, *timed)}
    unknown = set(args.shape or ()) - there.keys()
    if unknown:
        names = f"{', '.join(sorted(unknown))}: no such shape; choose from {', '.join(there)}"
        print(f"peers: --shape {names}", file=sys.stderr)
        return 2
    shapes = [there[name] for name in args.shape or there]
    rows: list[dict[str, Any]] = []
    body: dict[str, Any] = {"device": args.device, "threads": args.threads, "rounds": args.rounds, "rows": rows}
    try:
        checkout = Checkout(args.ijepa) if args.ijepa else None
        if args.alone:
            print(json.dumps(_measure_alone(args.alone, shapes[0], checkout, ranks)))
            return 0
        chosen, body["missing"] = _chosen(args.peers, checkout)
        for name, reason in body["missing"].items():
            _say(f"{name}: left out: {reason}")
        for row in compare(shapes, timed, chosen, Comparison(args, checkout, ranks, begin + args.until)):
            rows.append(row)
            _say(line(row))
            if args.json != "-":
                write_result(args.json, "peers", body)  # a stopped run keeps its rows
    except UserError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    finally:
        if args.json == "-" and rows:
            write_result("-", "peers", body)
    return int(any(row.get("skipped", "").startswith("failed") for row in rows))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.peers", main))
