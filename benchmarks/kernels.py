"""Time the kernels against their baselines, by shape: milliseconds, share of the machine's limits, memory, error.

    python -m benchmarks.kernels --json FILE [--device cuda|cpu] [--repeats 30] [--only conditioned_mlp]
        [--contenders NAME ...] [--without NAME ...]

Each implementation computes the same operation from the same inputs, forward alone and, where the operation has
gradients, forward and backward. Inputs are random and rotated so that they do not stay in cache. Results are compared
with float64 before anything is timed; an implementation with wrong results is not timed. Every implementation has a row
for every case, with its version and, if it is not timed, the reason; `contenders` in FILE notes which part of it is a
library's and which is PyTorch's. Without a GPU the PyTorch baselines run at a small size; FLOPs, bytes and floors are
those of the full sizes. Plot FILE with `benchmarks.plots.kernels`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from iwm_fast.benchmarks.baselines.kernels import CONTENDERS, Contender, reference
from iwm_fast.benchmarks.baselines.skipped import Skipped, in_a_line
from iwm_fast.benchmarks.cases.kernel_cases import CASES, OPERATIONS, Case, at_most, inputs
from iwm_fast.environment import environment
from iwm_fast.measure.timing import ceilings, seconds, spread
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_json

__all__ = ["measure"]

SCHEMA = "iwm-fast-kernels/1"
# Twice the L2 of the largest supported GPU (B200, 126 MB) is read before an input is used again.
_ROTATED_BYTES = 256 * 2**20
# Relative error allowed in bf16. A few roundings of 2⁻⁸ are 0.01, but eager PyTorch on a CPU sums LayerNorm's gradients
# in bf16 and is 0.05 off at 2,048 tokens.
_WRONG = 0.1
_CHECKED_TOKENS = 2048
_CPU_TOKENS = 4096


def _leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}


def _upstream(case: Case, given: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """Upstream gradients of the outputs; None for a loss, whose gradient is 1."""
    if case.operation == "predictor_input":
        return (given["context"].new_empty(len(given["place"]), case.width).normal_(),)
    if case.operation == "sigreg_sums":
        return (torch.randn(2, case.hidden, case.width, device=given["p"].device),)
    if case.operation == "rope":
        return tuple(torch.randn_like(part) for part in given["qkv"].detach().unbind(1))
    if "x" not in given:
        return None
    return tuple(torch.randn_like(given["x"]) for _ in range(2 if case.operation == "residual_norm" else 1))


def _answers(run: Callable[..., Any], given: dict[str, Any], upstream: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
    """Return the outputs and the gradient of each leaf; for an in-place operation, the updated tensors."""
    out = run(**given)
    if out is None:
        return {k: torch.cat([t.flatten() for t in v]) for k, v in given.items() if isinstance(v, list)}
    results = out if isinstance(out, tuple) else (out,)
    named = {f"out {i}" if i else "out": result.detach() for i, result in enumerate(results)}
    leaves = _leaves(given)
    grads = torch.autograd.grad(results, list(leaves.values()), upstream) if leaves else ()
    return named | dict(zip(leaves, grads, strict=True))


def _widened(value: Any) -> Any:
    """Return the same arguments in float64: tensors as new leaves, lists of tensors, and dtypes."""
    if isinstance(value, list):
        return [_widened(v) for v in value]
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def errors(run: Callable[..., Any], contender: Contender, case: Case, device: torch.device) -> dict[str, float]:
    """Return ‖result − float64‖ / ‖float64‖ of the output and of each gradient, at 2,048 tokens of the same widths.

    An implementation compiled for one size is checked at the timed size: another size would compile other code.
    """
    exact = reference(case.operation, contender.gelu)
    small = case if contender.one_size else at_most(case, _CHECKED_TOKENS, 16, 4096, 1)
    given = inputs(small, device, torch.bfloat16, seed=1)
    wide = {k: _widened(v) for k, v in given.items()}
    upstream = _upstream(small, given)
    for _ in range(contender.settles):
        found = _answers(run, given, upstream)
    wanted = _answers(exact, wide, None if upstream is None else tuple(u.double() for u in upstream))
    exactly = {k: w.double() for k, w in wanted.items()}
    return {k: float((found[k].double() - w).norm() / w.norm()) for k, w in exactly.items()}


def kept_bytes(run: Callable[..., Any], given: dict[str, Any]) -> int:
    """Return the bytes saved for the backward pass, without the inputs themselves."""
    own = {v.untyped_storage().data_ptr() for v in given.values() if isinstance(v, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(**given)
    del out
    return sum(kept.values())


def measure(
    cases: list[Case],
    device: torch.device,
    repeats: int,
    say: Callable[[str], object],
    contenders: Sequence[str] | None = None,
    save: Callable[[dict[str, Any]], object] = lambda _document: None,
) -> dict[str, Any]:
    """Time every implementation on every case; return the document. ``save`` gets it after each implementation.

    contenders: time only these; the rows of others say that they were not selected.
    """
    limits = ceilings(device)
    rows: list[dict[str, Any]] = []
    about = {name: {"version": one.version, "note": one.note} for name, one in CONTENDERS.items()}
    document = {
        "schema": SCHEMA, "device": device.type, "ceilings": limits, "contenders": about, "rows": rows,
    }  # fmt: skip
    for asked in cases:
        case = asked
        if device.type == "cpu":
            case = at_most(asked, _CPU_TOKENS, 32, 8192, 1)
        one = inputs(case, device, torch.bfloat16)
        passes = (False, True) if _leaves(one) else (False,)
        floors = "; forward + backward ".join(_floor(asked, backward) for backward in passes)
        say(f"{asked.name}: {floors}" + ("" if case == asked else f"; timed as {case.name}"))
        size = sum(t.nbytes for t in tree_leaves(one) if isinstance(t, Tensor))
        copies = max(1, -(-_ROTATED_BYTES // size)) if device.type == "cuda" else 2
        rotated = [one, *(inputs(case, device, torch.bfloat16, seed=s) for s in range(2, copies + 1))]
        for name, contender in CONTENDERS.items():
            row = {"case": asdict(case), "contender": name, "version": contender.version}
            if contenders is not None and name not in contenders:
                found = [row | {"skipped": "not selected"}]
            else:
                found = _rows(row, contender, case, rotated, device, repeats, limits)
            rows += found
            for each in found:
                say("  " + _line(each))
            save(document)
    return document


def _rows(
    row: dict[str, Any], contender: Contender, case: Case, rotated: list[dict[str, Any]], device: torch.device,
    repeats: int, limits: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return an implementation's rows for one case: one per pass, or one with the reason why it is not timed."""
    rows = []
    try:
        try:
            run = contender.make(case.operation)
            contender.require(case, device)
            row["errors"] = errors(run, contender, case, device)
            if not all(error <= _WRONG for error in row["errors"].values()):  # also catches NaN
                return [row | {"skipped": "wrong result"}]
            row["kept_bytes"] = kept_bytes(run, rotated[0])
            passes = (False, True) if _leaves(rotated[0]) else (False,)
            for backward in passes:
                timed = _timed(run, contender, rotated, case, backward, device, repeats, limits)
                rows.append(row | timed)
        except contender.refusals() as error:
            raise Skipped(f"failed: {in_a_line(error)}") from error
    except Skipped as reason:
        rows.append(row | {"skipped": str(reason)})
    return rows


def _timed(
    run: Callable[..., Any], contender: Contender, rotated: list[dict[str, Any]], case: Case, backward: bool,
    device: torch.device, repeats: int, limits: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    upstream = _upstream(case, rotated[0])

    def call(i: int) -> None:
        given = rotated[i % len(rotated)]
        if backward:
            _answers(run, given, upstream)
        else:
            with torch.no_grad():
                run(**given)

    for _ in range(contender.settles - 1):
        for i in range(len(rotated)):
            call(i)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    samples = seconds(call, device, repeats)
    known = device.type == "cuda" and not contender.graphs
    peak = torch.cuda.max_memory_allocated(device) - before if known else None
    counts, middle = case.counts(backward), spread(samples)["p50"]
    return {
        "passes": "forward+backward" if backward else "forward",
        "seconds": samples,
        **spread(samples),
        **counts,
        "share_of_matmul": counts["flops"] / middle / limits["matmul_flops_per_s"],
        "share_of_copy": counts["bytes"] / middle / limits["copy_bytes_per_s"],
        "peak_bytes": peak,
    }


def _floor(case: Case, backward: bool) -> str:
    counts = case.counts(backward)
    return f"{counts['flops'] / 1e9:.1f} GFLOP, at least {counts['bytes'] / 1e6:.0f} MB"


def _line(row: dict[str, Any]) -> str:
    name = f"{row['contender']} {row['version'] or '–'}"
    if "skipped" in row:
        wrong = f": {row['errors']}" if "wrong" in row["skipped"] else ""
        return f"{name:46} not timed: {row['skipped']}{wrong}"
    return (
        f"{name:46} {row['passes']:17} {row['p50'] * 1e3:9.3f} ms ({row['p20'] * 1e3:.3f} – "
        f"{row['p80'] * 1e3:.3f})  matmul {row['share_of_matmul']:6.1%}  copy {row['share_of_copy']:6.1%}  "
        f"saved {row['kept_bytes'] / 1e6:.0f} MB  error {max(row['errors'].values()):.1e}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", choices=OPERATIONS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--without", nargs="+", choices=CONTENDERS, default=[], metavar="NAME")
    args = parser.parse_args()
    require_result(args.json)
    cases = [case for case in CASES if args.only in (None, case.operation)]
    names = [name for name in args.contenders if name not in args.without]
    made_with = environment()

    def save(document: dict[str, Any]) -> None:
        write_json(args.json, document | {"environment": made_with}, indent=None)

    if str(args.json) == "-":
        save(measure(cases, torch.device(args.device), args.repeats, partial(print, file=sys.stderr), names))
    else:
        save(measure(cases, torch.device(args.device), args.repeats, partial(print, flush=True), names, save))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.kernels", main))
