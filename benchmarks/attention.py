"""Time attention over packed images of a step's sequence lengths: iwm-fast's and every other installed implementation.

    python -m benchmarks.attention --json FILE [--device cuda|cpu] [--rounds 15] [--dtype bf16|fp32] [--only WORDS]
                                  [--table FILE]

Sequence lengths come from the masks that training samples, for the context encoder, the target encoder and the
predictor. Every implementation gets one packed tensor of q, k and v, (N, 3, heads, d), and returns its gradient. Those
that need images bucketed by length (all of them on the CPU) get them in ascending order of length, as the model sorts
them there. Padding, nested tensors and masks that an implementation builds from the tensor are part of its time; what
it can prepare from the lengths alone is not. Outputs and gradients are compared with float64, one image at a time,
before anything is timed. Implementations are timed in turn.

On a GPU, `table` in the result holds what model.attention=auto reads, from those rows that are a value of
model.attention. --table writes it into a file of the form of kernels/tuned.json and replaces the entries for these
lengths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from iwm_fast.benchmarks.baselines.attention import BACKEND_OF, CONTENDERS, Attend, by_formula
from iwm_fast.benchmarks.baselines.skipped import Skipped, in_a_line
from iwm_fast.benchmarks.parts.attention_table import table_of, whole_table, write_table
from iwm_fast.config import load_config, packaged_config
from iwm_fast.cost.tokens import tokens_of
from iwm_fast.errors import UserError
from iwm_fast.measure.timing import clocked, spread
from iwm_fast.models.attention import GROUPED
from iwm_fast.models.measured_attention import attention_key
from iwm_fast.models.packing import Segments
from iwm_fast.models.xformers_operators import dispatched
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["CASES", "PARTS", "Case", "lengths_of", "main", "measure"]

# ‖output − float64‖ / ‖float64‖ above which an implementation is not timed: a few roundings of 2⁻⁸ and of 2⁻²³.
_WRONG = {torch.bfloat16: 0.03, torch.float32: 1e-4}
_SLOW_S, _SLOW_ROUNDS = 0.5, 3


@dataclass(frozen=True)
class Case:
    """Attention of one network: `part` of the step of a packaged configuration, for this number of images."""

    config: str
    part: str
    images: int

    @property
    def name(self) -> str:
        """The row's label in tables."""
        return f"{self.config} {self.part}, {self.images} images"


PARTS = ("context", "target", "predictor")
CASES = {
    "cuda": [Case("vit_base_p16_224_equi", part, 256) for part in PARTS]
    + [Case("vit_large_p16_224", part, 128) for part in PARTS],
    "cpu": [Case("vit_tiny_p8_96", part, 32) for part in PARTS] + [Case("vit_tiny_p4_32", part, 128) for part in PARTS],
}


def lengths_of(case: Case) -> tuple[list[int], int, int]:
    """Return the tokens of each image, the number of heads, and the head dimension."""
    config = load_config(packaged_config(case.config), [])
    encoder, predictor, prefix = config.model.encoder_shape, config.model.predictor, config.model.prefix_tokens
    if case.part == "target":
        return [prefix + config.model.grid**2] * case.images, encoder.heads, encoder.width // encoder.heads
    tokens = tokens_of(config, case.images)
    if case.part == "context":
        return (prefix + tokens.context).tolist(), encoder.heads, encoder.width // encoder.heads
    joined = tokens.context + tokens.predicted
    return joined.tolist(), predictor.head_count, predictor.width // predictor.head_count


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _call(attend: Attend, given: Tensor, upstream: Tensor, backward: bool) -> list[Tensor]:
    if not backward:
        with torch.no_grad():
            return [attend(given)]
    out = attend(given)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


def _parts(found: list[Tensor]) -> list[Tensor]:
    """Split [output, gradient] into the output and the gradients of q, k and v."""
    return [found[0], *(part for grad in found[1:] for part in grad.unbind(1))]


@dataclass(frozen=True)
class _Given:
    """Inputs of all implementations that take the images in one order, and the float64 result."""

    segments: Segments
    qkv: Tensor
    upstream: Tensor
    wanted: list[Tensor]

    @classmethod
    def drawn(cls, lengths: list[int], heads: int, head: int, device: torch.device, dtype: torch.dtype) -> _Given:
        segments = Segments.from_lengths(lengths, device)
        generator = torch.Generator(device).manual_seed(0)
        shape = (segments.total, 3, heads, head)
        qkv = torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(dtype).requires_grad_()
        upstream = torch.randn(qkv[:, 0].shape, generator=generator, device=device, dtype=torch.float64).to(dtype)
        wide = qkv.detach().double().requires_grad_()
        return cls(segments, qkv, upstream, _parts(_call(by_formula(segments), wide, upstream.double(), True)))


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Return one row per implementation and pass: forward, then forward and backward."""
    lengths, heads, head = lengths_of(case)
    ascending = _Given.drawn(sorted(lengths), heads, head, device, dtype)
    as_drawn = ascending if device.type == "cpu" else _Given.drawn(lengths, heads, head, device, dtype)
    products = 4 * heads * head * sum(n * n for n in lengths)
    about = {
        "case": case.name, "tokens": sum(lengths), "heads": heads, "head": head, "dtype": str(dtype)[6:],
        "shortest": min(lengths), "longest": max(lengths),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    timed: list[_Timed] = []
    for name, (make, version) in CONTENDERS.items():
        given = ascending if BACKEND_OF.get(name) in GROUPED else as_drawn
        for backward in (False, True):
            row: dict[str, Any] = about | {"contender": name, "version": version, "backward": backward}
            if name in BACKEND_OF:
                row["backend"] = BACKEND_OF[name]
                row["key"] = attention_key(given.segments, heads, head, dtype, gradients=backward)
            rows.append(row)
            attend = _right(row, make, given, dtype)
            if attend is not None:
                row |= {"flops": products * (3 if backward else 1), "seconds": []}
                timed.append(_Timed(row, attend, given, backward))
            if name == "xformers" and attend is not None:
                row["operator"] = dispatched(device, head, dtype)
    _take_turns(timed, device, rounds)
    for row in rows:
        say(_line(row))
    return rows


def _right(row: dict[str, Any], make: Callable[[Segments], Attend], given: _Given, dtype: torch.dtype) -> Attend | None:
    """Return the implementation's call if its results are right; else None, with the reason in the row."""
    try:
        attend = make(given.segments)
        found = _call(attend, given.qkv, given.upstream, row["backward"])
    except Skipped as reason:
        row["skipped"] = str(reason)
        return None
    except (RuntimeError, NotImplementedError, ValueError) as error:  # what libraries raise for unsupported inputs
        row["skipped"] = in_a_line(error)
        return None
    worst = max(_relative(f, w) for f, w in zip(_parts(found), given.wanted, strict=False))
    row["error"] = worst
    if not worst <= _WRONG[dtype]:
        row["skipped"] = "wrong result"
        return None
    return attend


@dataclass(frozen=True)
class _Timed:
    row: dict[str, Any]
    attend: Attend
    given: _Given
    backward: bool

    def __call__(self) -> None:
        _call(self.attend, self.given.qkv, self.given.upstream, self.backward)


def _take_turns(timed: list[_Timed], device: torch.device, rounds: int) -> None:
    """Time all in turn. The first round is a warm-up; very slow ones stop after three rounds."""
    for number in range(rounds + 1):
        for one in timed:
            seconds = one.row["seconds"]
            if number > _SLOW_ROUNDS and median(seconds) > _SLOW_S:
                continue
            taken = clocked(one, device).seconds
            seconds += [taken] if number else []
    for one in timed:
        one.row.update(spread(one.row["seconds"]))


def _line(row: dict[str, Any]) -> str:
    what = f"{row['case']} {row['contender']}{', forward + backward' if row['backward'] else ''}"
    if "skipped" in row:
        return f"{what}: skipped: {row['skipped']}"
    times = [f"{row[key] * 1e3:.3f}" for key in ("p50", "p20", "p80")]
    return f"{what}: {times[0]} ms ({times[1]} – {times[2]}), error {row['error']:.0e}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", metavar="WORDS", help="time only cases whose name contains WORDS")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the measured choices into this tuned.json")
    args = parser.parse_args()
    require_result(args.json)
    if args.table:
        whole_table(args.table)
    cases = [case for case in CASES[args.device] if args.only in case.name]
    if not cases:
        there = "; ".join(case.name for case in CASES[args.device])
        raise UserError(f"--only {args.only}: no such case; choose from {there}")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    say = partial(print, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    rows: list[dict[str, Any]] = []
    body = {"rows": rows, "device": args.device, "threads": torch.get_num_threads(), "command": sys.argv[1:]}
    device = torch.device(args.device)
    for case in cases:
        rows += measure(case, device, dtype, args.rounds, say)
        body["table"] = table_of(rows, device)
        if args.json != "-":
            write_result(args.json, "attention", body)  # a stopped run keeps its rows
    if args.json == "-":
        write_result("-", "attention", body)
    if args.table:
        write_table(args.table, table_of(rows, device))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.attention", main))
