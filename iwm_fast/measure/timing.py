"""Time functions, and measure the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from iwm_fast.kernels._tuning.gpu_time import gpu_seconds

__all__ = ["Clocked", "ceilings", "clocked", "seconds", "spread"]

_WARM_UP = 3


@dataclass(frozen=True)
class Clocked:
    """Wall-clock seconds, and processor time of all threads of the process."""

    seconds: float
    cpu_seconds: float


def clocked(call: Callable[[], object], device: torch.device) -> Clocked:
    """Time one call, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, busy = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Clocked(time.perf_counter() - start, time.process_time() - busy)


def seconds(call: Callable[[int], object], device: torch.device, repeats: int = 20) -> list[float]:
    """Return the seconds of each of `repeats` calls after three warm-up calls. `call` gets its index, to rotate inputs.

    On a GPU, device time without launches (`gpu_seconds`); on a CPU, wall-clock time.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return gpu_seconds(call, repeats, _WARM_UP)
    found = []
    for i in range(_WARM_UP + repeats):
        start = time.perf_counter()
        call(i)
        found.append(time.perf_counter() - start)
    return found[_WARM_UP:]


def spread(values: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80."""
    if len(values) < 2:
        return {"p20": values[0], "p50": values[0], "p80": values[0]}
    fifths = quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": median(values), "p80": fifths[3]}


def ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Measure copy bandwidth (bytes read plus bytes written) and matmul FLOP/s of random operands of `dtype`.

    copy and matmul: medians at one size. copies and matmul_best: the fastest of several sizes, the smaller ones in
    cache: upper limits of any call.
    """
    on_gpu = device.type == "cuda"
    size, side = (2**31, 8192) if on_gpu else (2**26, 512)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = seconds(lambda _: target.copy_(source), device)
    product = seconds(lambda _: a @ b, device)
    copies = []
    for part in (2**power for power in range(20 if on_gpu else 11, size.bit_length(), 3)):
        fastest = min(seconds(lambda _, part=part: target[:part].copy_(source[:part]), device))  # type: ignore[misc]
        copies.append({"bytes": 2 * part, "bytes_per_s": 2 * part / fastest})
    best = 2 * side**3 / min(product)
    for less in (side // 4, side // 2):
        fastest = min(seconds(lambda _, n=less: a[:n, :n] @ b[:n, :n], device))  # type: ignore[misc]
        best = max(best, 2 * less**3 / fastest)
    return {
        "copy_seconds": copy,
        "copy_bytes_per_s": 2 * size / median(copy),
        "copies": copies,
        "matmul_side": side,
        "matmul_seconds": product,
        "matmul_flops_per_s": 2 * side**3 / median(product),
        "matmul_best_flops_per_s": best,
    }
