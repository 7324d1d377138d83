"""Kernels that one call of the conditioned MLP launches, counted without a GPU.

    python -m benchmarks.launches --mlp N,D,H,A --json FILE

N tokens, D width, H hidden units, A action components (0: no action). The launchers run on tensors without memory; each
launch of a Triton kernel is counted, and each PyTorch operator that would launch one: all but views and allocations.
Matmuls take the first candidate of sm_90. Beside the counts: the most bytes that the call holds at once, its results
included and its inputs not.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iwm_fast.errors import UserError
from iwm_fast.kernels import _mlp_triton
from iwm_fast.kernels._candidates import Choice, candidates_of, possible
from iwm_fast.kernels._launches import recording
from iwm_fast.kernels._tuning import use_tuner
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["Launched", "count_launches", "mlp_launches"]

_ARCHITECTURE = "sm_90"
_IMAGES = 512
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Launched:
    """Launches of a piece of work: Triton's kernels and PyTorch's. peak_bytes: the most it holds at once."""

    triton: int
    torch: int
    kernels: dict[str, int]
    peak_bytes: int


class _First:
    """In the tuner's place: the first candidate."""

    def run(
        self, product: str, dtype: torch.dtype, _: tuple[int, int, int], call: Callable[[Choice], Any], about: str
    ) -> Any:
        found = candidates_of(_ARCHITECTURE, product)
        return call(next(c for c in found if possible(c, _ARCHITECTURE, dtype.itemsize, about)))


class _Operators(TorchDispatchMode):
    """Counts PyTorch's operators that launch a kernel, and bytes that are allocated inside and still held."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.held = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        returns = func._schema.returns  # noqa: SLF001  (torch has no public name for it)
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or name == "_unsafe_view":  # of a copy that reshape made
            return out
        if name not in _ALLOCATIONS:
            self.count += 1
        if not any(r.alias_info is not None for r in returns):
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    self._hold(value)
        return out

    def _hold(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


def count_launches(work: Callable[[], object]) -> Launched:
    """Count what `work` launches; its tensors are on the meta device."""
    kernels: dict[str, int] = {}

    def record(kernel: Any, _: dict[str, Any]) -> None:
        kernels[kernel.__name__] = kernels.get(kernel.__name__, 0) + 1

    operators = _Operators()
    with recording(record), use_tuner(_First()), operators:
        work()
    return Launched(sum(kernels.values()), operators.count, dict(sorted(kernels.items())), operators.peak)


def mlp_launches(tokens: int, width: int, hidden: int, actions: int) -> dict[str, Launched]:
    """Of one call in bf16 with normalisation and residual, and of its backward pass."""

    def empty(*shape: int, kind: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    images = min(_IMAGES, tokens)
    action = (empty(images, actions), empty(hidden, actions)) if actions else (None, None)
    bounds = empty(images + 1, kind=torch.int32) if actions else None
    inputs: tuple[Any, ...] = (
        empty(tokens, width), empty(hidden, width), empty(hidden), empty(width, hidden), empty(width),
        *action, bounds, empty(width), empty(width), True, 1e-6, "gelu",
    )  # fmt: skip
    backward_inputs: tuple[Any, ...] = (empty(tokens, width), *inputs, True)
    return {
        "forward": count_launches(lambda: _mlp_triton.forward(*inputs)),
        "backward": count_launches(lambda: _mlp_triton.backward(*backward_inputs)),
    }


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes[:3]) < 1 or sizes[3] < 0:
        raise UserError(f"--mlp {text}: give four whole numbers N,D,H,A: at least 1, A at least 0")
    return sizes


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--mlp", metavar="N,D,H,A", required=True, help="tokens, width, hidden units, action components"
    )
    parser.add_argument("--json", required=True, help="file to write, or -")
    args = parser.parse_args(words)
    require_result(args.json)
    counts = mlp_launches(*_sizes(args.mlp))
    for name, found in counts.items():
        kernels = ", ".join(f"{n} {kernel.removesuffix('_kernel')}" for kernel, n in found.kernels.items())
        total = found.triton + found.torch
        print(f"{name:10}{total:4} launches: {found.triton} Triton ({kernels}), {found.torch} PyTorch")
    write_result(args.json, "launches", {"mlp": args.mlp} | {name: asdict(found) for name, found in counts.items()})


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.launches", main))
