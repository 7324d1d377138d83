"""Count launches and memory of a function without a GPU.

Triton kernels are recorded by their launchers; each PyTorch operator counts the kernels that it launches on CUDA
(`launch_rules`). The project's own operators run their launchers on tensors of any device. Matmuls use the first
candidate of sm_90.
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
    """Launches of Triton's and PyTorch's kernels. peak_bytes: the maximum of bytes allocated at once."""

    triton: int
    torch: int
    kernels: dict[str, int]
    peak_bytes: int


class _First:
    """Replaces the tuner: always the first candidate."""

    def run(
        self, product: str, dtype: torch.dtype, _: tuple[int, int, int], call: Callable[[Choice], Any], about: str
    ) -> Any:
        found = candidates_of(_ARCHITECTURE, product)
        return call(next(c for c in found if possible(c, _ARCHITECTURE, dtype.itemsize, about)))


class Launches(TorchDispatchMode):
    """Counts launches inside, by the part that ``part_of`` returns, and the bytes allocated inside and not yet freed.

    part_of: maps the name of the operator, or of a Triton kernel launched outside one of ours, to its part; None: not
    counted.
    """

    def __init__(self, part_of: Callable[[str], str | None] = lambda _: "") -> None:
        super().__init__()
        self.part_of = part_of
        self.torch: Counter[str] = Counter()
        self.triton: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.held = self.peak = 0
        self._operator = ""  # our operator that is running

    def add_torch(self, name: str, launches: int) -> None:
        """Count launches of PyTorch or of a library."""
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
        """Run one of our operators as on a GPU; on meta tensors torch itself would only infer shapes."""
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
    """Count launches inside; Triton's kernels do not run."""
    with recording(lambda kernel, _: launches.add_triton(kernel.__name__)), use_tuner(_First()), launches:
        yield


def count_launches(work: Callable[[], object]) -> Launched:
    """Count the launches of `work`, whose tensors are on the meta device."""
    launches = Launches()
    with counting(launches):
        work()
    kernels = dict(sorted(launches.kernels.items()))
    return Launched(launches.triton.total(), launches.torch.total(), kernels, launches.peak)
