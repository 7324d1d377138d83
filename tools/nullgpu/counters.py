"""The null GPU's counters, read from inside a process that runs on it."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Counts", "compiled", "counts"]

_COMPILED: list[str] = []


@dataclass(frozen=True)
class Counts:
    """What has happened since the process began, or between two readings (their difference).

    aten, triton: kernels launched by the runtime's API (PyTorch, xformers) and the driver's (Triton). library: calls of
    cuBLAS, cuDNN and cuSOLVER that compute, each one kernel or more. collectives: calls of NCCL that send. waits: times
    that the host waits for the device. uploads: copies to it. allocations: of device memory from CUDA. variants: Triton
    kernels compiled or loaded for new arguments. host_s, process_s: processor seconds of this thread, and of all.
    """

    aten: int = 0
    triton: int = 0
    library: int = 0
    collectives: int = 0
    waits: int = 0
    uploads: int = 0
    allocations: int = 0
    variants: int = 0
    host_s: float = 0.0
    process_s: float = 0.0

    @property
    def launches(self) -> int:
        """Kernels of PyTorch and Triton; those inside libraries are not seen."""
        return self.aten + self.triton

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def row(self) -> dict[str, float]:
        """For JSON, with their sum ``launches``."""
        return {"launches": self.launches, **asdict(self)}


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(os.environ["NULLGPU"]) / name))


def _count_variants() -> None:
    import triton

    def note(*, fn: Any, **_: object) -> None:
        _COMPILED.append(fn.name.rpartition(".")[2])

    triton.knobs.runtime.jit_post_compile_hook = note


_RUNTIME, _DRIVER = _library("libnullrt.so"), _library("libcuda.so.1")
_count_variants()


def _read(library: ctypes.CDLL, name: str) -> int:
    return int(ctypes.c_long.in_dll(library, f"nullgpu_{name}").value)


def counts() -> Counts:
    """The counters now."""
    of_runtime = ("aten", "library", "collectives", "waits", "uploads", "allocations")
    return Counts(
        **{name: _read(_RUNTIME, name) for name in of_runtime},
        triton=_read(_DRIVER, "triton"),
        variants=len(_COMPILED),
        host_s=time.thread_time(),
        process_s=time.process_time(),
    )


def compiled() -> list[str]:
    """Names of the Triton kernels that were compiled or loaded, one for each variant, in order."""
    return list(_COMPILED)
