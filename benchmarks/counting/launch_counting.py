"""Launches and memory of a piece of work, counted without a GPU.

Each launch of a Triton kernel is recorded by its launcher, and each operator of PyTorch counts the kernels that it
launches on CUDA (`launch_rules`). The project's own operators run their launchers, whatever device the tensors are on.
Matmuls take the first candidate of sm_90.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from iwm_fast.benchmarks.counting.launch_rules import operator_launches
from iwm_fast.kernels._aot.launches import recording
from iwm_fast.kernels._tuning.candidates import Choice, candidates_of, possible
from iwm_fast.kernels._tuning.tuner import use_tuner

__all__ = ["Launched", "Launches", "count_launches", "counting"]

_ARCHITECTURE = "sm_90"
_OURS = "iwm_fast"


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


class Launches(TorchDispatchMode):
    """Counts launches inside, by the part that ``part_of`` names, and bytes that are allocated inside and still held.

    part_of: of what is being launched, the name of the operator, or of the Triton kernel outside one of ours; None: not
    counted.
    """

    def __init__(self, part_of: Callable[[str], str | None] = lambda _: "") -> None:
        super().__init__()
        self.part_of = part_of
        self.torch: Counter[str] = Counter()
        self.triton: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.held = self.peak = 0
        self._operator = ""  # of ours, while it runs

    def add_torch(self, name: str, launches: int) -> None:
        """Count launches of PyTorch or of a library that it calls."""
        part = self.part_of(self._operator or name) if launches else None
        if part is not None:
            self.torch[part] += launches

    def add_triton(self, name: str) -> None:
        """Count a launch of a Triton kernel."""
        part = self.part_of(self._operator or name)
        if part is not None:
            self.triton[part] += 1
            self.kernels[name] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == _OURS:
            return self._run(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        self.add_torch(func.overloadpacket.__name__, operator_launches(func, args, out))
        if not any(r.alias_info is not None for r in func._schema.returns):  # noqa: SLF001  (no public name)
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    self._hold(value)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator of ours does on a GPU; torch itself asks for shapes only where tensors have no memory."""
        operator = OPDEFS[func._schema.name]._init_fn  # noqa: SLF001  (has no public name)
        before, self._operator = self._operator, func.overloadpacket.__name__
        try:
            with self:
                return operator(*args, **kwargs)
        finally:
            self._operator = before

    def _hold(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


@contextlib.contextmanager
def counting(launches: Launches) -> Iterator[None]:
    """Count what is launched inside; Triton's kernels are not run."""
    with recording(lambda kernel, _: launches.add_triton(kernel.__name__)), use_tuner(_First()), launches:
        yield


def count_launches(work: Callable[[], object]) -> Launched:
    """Count what `work` launches; its tensors are on the meta device."""
    launches = Launches()
    with counting(launches):
        work()
    kernels = dict(sorted(launches.kernels.items()))
    return Launched(launches.triton.total(), launches.torch.total(), kernels, launches.peak)
