"""Measure the machine's limits: copy and L2 bandwidth, matmul throughput, and the time of a launch.

    python -m benchmarks.ceilings --json FILE [--device cuda|cpu]

A copy counts bytes read plus bytes written. L2 reads and launches are measured on a GPU only.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

from iwm_fast.measure.timing import ceilings, seconds
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["l2_read", "launch_cost", "require_sums"]

_LAUNCHES = 2000
_BLOCK = 4096
_PASSES = 64


@triton.jit
def _read_kernel(x_ptr, out_ptr, BLOCKS, PASSES, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202 - Triton's
    """Read BLOCKS blocks of fp32 PASSES times, each program from another offset. Their stored sum keeps the reads."""
    i = tl.program_id(0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for step in range(PASSES):
        block = (i + step * 37) % BLOCKS
        acc += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + i, tl.sum(acc, axis=0))


def l2_read(device: torch.device) -> dict[str, Any]:
    """Return bytes per second read from L2, with a buffer of a quarter of it that every multiprocessor rereads."""
    properties = torch.cuda.get_device_properties(device)
    blocks = properties.L2_cache_size // 4 // (4 * _BLOCK)
    programs = 4 * properties.multi_processor_count
    x = torch.ones(blocks * _BLOCK, device=device)
    out = torch.empty(programs, device=device)
    taken = seconds(lambda _: _read_kernel[(programs,)](x, out, blocks, _PASSES, BLOCK=_BLOCK, num_warps=8), device)
    require_sums(out)
    return {"l2_read_seconds": taken, "l2_read_bytes_per_s": programs * _PASSES * _BLOCK * 4 / median(taken)}


def require_sums(out: torch.Tensor) -> None:
    """Raise RuntimeError unless every program read its ones."""
    if not torch.allclose(out, torch.full_like(out, float(_PASSES * _BLOCK))):
        raise RuntimeError("the kernel that reads L2 returned a wrong sum: discard this measurement")


def launch_cost(device: torch.device) -> dict[str, Any]:
    """Return seconds to launch one small kernel, on the host and until the device has run it, with a full queue."""
    x = torch.zeros(1, device=device)
    host, whole = [], []
    for _ in range(5):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_LAUNCHES):
            x.add_(1.0)
        host.append((time.perf_counter() - begin) / _LAUNCHES)
        torch.cuda.synchronize(device)
        whole.append((time.perf_counter() - begin) / _LAUNCHES)
    return {"launch_host_s": median(host), "launch_s": median(whole)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    require_result(args.json)
    device = torch.device(args.device)
    body: dict[str, Any] = {"device": args.device}
    measures = [ceilings, l2_read, launch_cost] if device.type == "cuda" else [ceilings]
    for measure in measures:
        body |= measure(device)
        if args.json != "-":
            write_result(args.json, "ceilings", body)  # a stopped run keeps its rows
    if args.json == "-":
        write_result("-", "ceilings", body)
    else:
        for name, value in body.items():
            if name.endswith(("_per_s", "_s")):
                print(f"{name}: {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.ceilings", main))
