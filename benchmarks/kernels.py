"""The kernels against what a user would otherwise call, by shape: time, share of the machine's limits, memory, error.

    python -m benchmarks.kernels --json FILE [--device cuda|cpu] [--repeats 30] [--only conditioned_mlp]

Each contender computes the same operation from the same inputs, forward alone and forward with all gradients. Inputs
are random and rotated past the cache; the answers are compared with float64 before anything is timed, and a contender
whose answers are wrong is not timed. Without a GPU the PyTorch contenders run at a small size, and the counts and
floors are those of every size. `benchmarks.draw_kernels` draws the file that this writes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iwm_fast.benchmarks.contenders import CONTENDERS, Skipped
from iwm_fast.benchmarks.timing import ceilings, seconds, spread
from iwm_fast.kernels import (
    conditioned_mlp_bytes,
    conditioned_mlp_flops,
    stopgrad_l2_bytes,
    stopgrad_l2_flops,
)
from iwm_fast.planning.environment import environment

__all__ = ["CASES", "Case", "measure"]

SCHEMA = "iwm-fast-kernels/1"
ELEMENT = 2  # bytes of bf16
# Twice the L2 of the largest chip in use (B200, 126 MB) is walked through before an input comes round again.
_ROTATED_BYTES = 256 * 2**20
# Share of the exact result by which a bf16 answer may differ. A few roundings of 2⁻⁸ are 0.01, but eager PyTorch on a
# CPU sums the normalisation's gradients in bf16 and is 0.05 off at 2,048 tokens.
_WRONG = 0.1
_CHECKED_TOKENS = 2048
_CPU_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """One operation at one size. hidden and actions concern the MLP; rows, the table of targets, the loss."""

    operation: str
    tokens: int
    width: int
    hidden: int = 0
    actions: int = 0
    images: int = 0
    rows: int = 0

    @property
    def name(self) -> str:
        """For tables."""
        tail = f" H={self.hidden} A={self.actions}" if self.operation == "conditioned_mlp" else f" of {self.rows}"
        return f"{self.operation} N={self.tokens} D={self.width}{tail}"

    def counts(self, backward: bool) -> dict[str, int]:
        """Useful operations and fewest bytes, of the forward pass or of both."""
        if self.operation == "stopgrad_l2":
            return {
                "flops": stopgrad_l2_flops(self.tokens, self.width, normalize_target=True),
                "bytes": stopgrad_l2_bytes(self.tokens, self.width, element=ELEMENT, gradient=backward),
            }
        sizes = (self.tokens, self.width, self.hidden, self.width)
        extra: dict[str, Any] = {"images": self.images, "actions": self.actions}
        passes = (False, True) if backward else (False,)
        return {
            "flops": sum(conditioned_mlp_flops(*sizes, **extra, backward=b) for b in passes),
            "bytes": sum(conditioned_mlp_bytes(*sizes, **extra, element=ELEMENT, backward=b) for b in passes),
        }


CASES = [
    Case("conditioned_mlp", 100_352, 384, 1536, 16, 512),  # predictor, ViT-B: 512 images of 196 tokens
    Case("conditioned_mlp", 100_352, 384, 1536, 0),
    Case("conditioned_mlp", 100_352, 192, 768, 16, 512),
    Case("conditioned_mlp", 50_176, 768, 3072, 0),  # encoders
    Case("conditioned_mlp", 50_176, 1024, 4096, 0),
    Case("conditioned_mlp", 25_088, 1280, 5120, 0),
    Case("stopgrad_l2", 100_352, 768, rows=200_704),
    Case("stopgrad_l2", 100_352, 1024, rows=200_704),
]


def inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Fresh leaves; weights of sizes that keep activations about 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, size: float = 1.0, leaf: bool = True) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32) * size
        return values.to(dtype).requires_grad_(leaf)

    n, d, h = case.tokens, case.width, case.hidden
    if case.operation == "stopgrad_l2":
        index = torch.randint(0, case.rows, (n,), generator=generator, device=device)
        return {"pred": draw(n, d), "target": draw(case.rows, d, leaf=False), "index": index}
    given: dict[str, Any] = {
        "x": draw(n, d),
        "w_in": draw(h, d, size=d**-0.5),
        "b_in": draw(h, size=0.1),
        "w_out": draw(d, h, size=h**-0.5),
        "b_out": draw(d, size=0.1),
        "norm_weight": draw(d),
        "norm_bias": draw(d, size=0.1),
    }
    if case.actions:
        bounds = torch.linspace(0, n, case.images + 1, device=device).round().to(torch.int32)
        given |= {
            "action": draw(case.images, case.actions, leaf=False),
            "w_action": draw(h, case.actions, size=case.actions**-0.5),
            "cu_seqlens": bounds,
        }
    return given


def _leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}


def _gradients(run: Callable[..., Tensor], given: dict[str, Any], upstream: Tensor | None) -> dict[str, Tensor]:
    out = run(**given)
    leaves = _leaves(given)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def errors(
    run: Callable[..., Tensor], exact: Callable[..., Tensor], case: Case, device: torch.device
) -> dict[str, float]:
    """‖answer − float64‖ / ‖float64‖ of the result and of each gradient, at 2,048 tokens of the same widths."""
    small = replace(
        case, tokens=min(case.tokens, _CHECKED_TOKENS), images=min(case.images, 16), rows=min(case.rows, 4096)
    )
    given = inputs(small, device, torch.bfloat16, seed=1)
    wide = {
        k: v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    upstream = None if case.operation == "stopgrad_l2" else torch.randn_like(given["x"])
    found = _gradients(run, given, upstream)
    wanted = _gradients(exact, wide, None if upstream is None else upstream.double())
    return {k: float((found[k].double() - w).norm() / w.norm()) for k, w in wanted.items()}


def kept_bytes(run: Callable[..., Tensor], given: dict[str, Any]) -> int:
    """Bytes that the forward pass keeps for the backward pass, the inputs themselves left out."""
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


def _time(
    run: Callable[..., Tensor], rotated: list[dict[str, Any]], backward: bool, device: torch.device, repeats: int
) -> list[float]:
    upstream = torch.randn_like(rotated[0]["x"]) if "x" in rotated[0] else None

    def call(i: int) -> None:
        given = rotated[i % len(rotated)]
        if backward:
            _gradients(run, given, upstream)
        else:
            with torch.no_grad():
                run(**given)

    return seconds(call, device, repeats)


def measure(cases: list[Case], device: torch.device, repeats: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Every contender on every case; ``rows`` of the document that is written."""
    limits = ceilings(device)
    rows: list[dict[str, Any]] = []
    for asked in cases:
        case = asked
        if device.type == "cpu":
            case = replace(
                asked, tokens=min(asked.tokens, _CPU_TOKENS), images=min(asked.images, 32), rows=min(asked.rows, 8192)
            )
        timed = "" if case == asked else f"; timed with {case.tokens} tokens"
        say(f"{asked.name}: {_floor(asked, False)}; with gradients {_floor(asked, True)}{timed}")
        one = inputs(case, device, torch.bfloat16)
        size = sum(v.nbytes for k, v in one.items() if k in ("x", "pred", "target"))
        copies = max(1, -(-_ROTATED_BYTES // size)) if device.type == "cuda" else 2
        rotated = [one, *(inputs(case, device, torch.bfloat16, seed=s) for s in range(2, copies + 1))]
        exact = CONTENDERS["eager"].make(case.operation)
        for name, contender in CONTENDERS.items():
            row: dict[str, Any] = {"case": asdict(case), "contender": name, "version": contender.version}
            try:
                run = contender.make(case.operation)
                contender.require(case, device)
                row["errors"] = errors(run, exact, case, device)
            except Skipped as reason:
                rows.append(row | {"skipped": str(reason)})
                say(f"  {name}: skipped: {reason}")
                continue
            if max(row["errors"].values()) > _WRONG:
                rows.append(row | {"skipped": "its answers are wrong"})
                say(f"  {name}: not timed, its answers are wrong: {row['errors']}")
                continue
            row["kept_bytes"] = kept_bytes(run, one)
            for backward in (False, True):
                rows.append(row | _timed(run, rotated, case, backward, device, repeats, limits))
                say("  " + _line(rows[-1]))
    return {"schema": SCHEMA, "device": device.type, "ceilings": limits, "rows": rows}


def _timed(
    run: Callable[..., Tensor], rotated: list[dict[str, Any]], case: Case, backward: bool, device: torch.device,
    repeats: int, limits: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    samples = _time(run, rotated, backward, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
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
    return (
        f"{row['contender']:22} {row['passes']:17} {row['p50'] * 1e3:9.3f} ms ({row['p20'] * 1e3:.3f} – "
        f"{row['p80'] * 1e3:.3f})  matmul {row['share_of_matmul']:6.1%}  copy {row['share_of_copy']:6.1%}  "
        f"kept {row['kept_bytes'] / 1e6:.0f} MB  error {max(row['errors'].values()):.1e}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", choices=["conditioned_mlp", "stopgrad_l2"])
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in (None, case.operation)]
    document = measure(cases, torch.device(args.device), args.repeats, print)
    args.json.write_text(json.dumps(document | {"environment": environment()}) + "\n")


if __name__ == "__main__":
    main()
