"""Upper bounds of a compiled kernel's speed, from its machine code: issue slots, tensor cores, waves, L2 bandwidth.

For one tile on one SM, in cycles, with one instruction per cycle and scheduler (four of them) and 4,096 tensor core
operations per cycle:

    T   tensor cores        2 · block_n · block_m · depth / 4096
    I   the main loop       warps / 4 · instructions per iteration · iterations
    E   outside the loop    warps / 4 · instructions of a tile outside the loop
    serial      T / (max(T, I) + E)       a tile's epilogue waits for its loop, and the next loop for the epilogue
    overlapped  T / max(T, I + E)         the epilogue runs beside another tile's loop

Overlap is possible only if two programs fit on an SM, or if a persistent program issues the next tile's loads before
the epilogue. The L2 bound is separate: the share of peak if operands arrive at the rates of L2_RATES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from iwm_fast.kernels._tuning.candidates import PROCESSORS, slices_of

from .launches import SHAPES, TOKENS, Launch
from .sass import Code

__all__ = ["L2_RATES", "Bound", "bounds_of", "matrix_bound", "role_of"]

# Assumed bytes per second from L2 to all SMs, not measured yet; and the clock that goes with them.
L2_RATES = (5.5e12, 7e12)
_FLOPS_A_CYCLE = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
_CLOCK = 1.755e9
_ELEMENT = 2
_MULTIPLIES = ("hidden", "project", "dx", "hidden_backward", "weight_grad")


@dataclass(frozen=True)
class Bound:
    """One row of `python -m iwm_fast.kernels.aot --bounds`: a kernel and a configuration."""

    kernel: str
    role: str
    arch: str
    shape: str
    config: dict[str, Any]
    wgmma: dict[str, int]
    loop_instructions: int
    outside_instructions: int
    loop_barriers: int
    # In the loop and around it.
    barriers: int
    registers: int
    spill_bytes: int
    programs: int
    persistent: bool
    tensor_cycles: float | None = None
    loop_cycles: float | None = None
    outside_cycles: float | None = None
    serial: float | None = None
    overlapped: float | None = None
    l2_bytes_per_token: float | None = None
    # Share of peak at each of L2_RATES, if L2 were the only limit.
    by_l2: tuple[float, ...] | None = None
    last_wave: float | None = None
    # Partial sums of a weight gradient, written and read, per token.
    partial_bytes_per_token: float | None = None
    # Instructions that an activation adds to an elementwise kernel.
    instructions_per_element: float | None = None

    @property
    def limit(self) -> float | None:
        """Return the least bound as a share of peak: issue slots and tensor cores, and L2 at its higher rate."""
        if self.serial is None or self.by_l2 is None:
            return None
        return min(self.serial if self.overlapped is None else self.overlapped, self.by_l2[-1])


def role_of(launch: Launch) -> str:
    """Return a kernel's role: hidden, project, dx, hidden_backward, weight_grad, norm_backward, ..."""
    name, given = launch.kernel.__name__.removesuffix("_kernel"), launch.arguments
    if name != "linear":
        return name
    if given["ACTIVATION"] != "none":
        return "hidden"
    return "project" if given["HAS_BIAS"] else "dx"


def bounds_of(launch: Launch, arch: str, code: Code, *, registers: int, spill_bytes: int, programs: int) -> list[Bound]:
    """Return the bounds of a compiled launch, one per shape if it is a matmul; none for a kernel without a loop."""
    role = role_of(launch)
    multiplies = role in _MULTIPLIES
    loop = code.loop(matrix=multiplies)
    if loop is None:
        return []
    given = launch.arguments
    config = {k: v for k, v in given.items() if k.startswith(("BLOCK_", "PARTS", "PIECES", "TMA"))} | launch.options
    about: dict[str, Any] = {
        "kernel": launch.kernel.__name__, "role": role, "arch": arch, "config": config,
        "wgmma": code.matrix_shapes, "loop_instructions": loop.instructions, "outside_instructions": loop.outside,
        "loop_barriers": loop.barriers, "barriers": code.barriers, "registers": registers,
        "spill_bytes": spill_bytes, "programs": programs,
        "persistent": loop.persistent,
    }  # fmt: skip
    shapes = [shape for shape in launch.shapes if shape in SHAPES]
    if not multiplies or not shapes:
        return [Bound(shape=launch.shape, **about)]
    return [Bound(shape=shape, **about, **matrix_bound(role, shape, about)) for shape in shapes]


def matrix_bound(role: str, shape: str, about: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a matmul of a shape: cycles, bounds, bytes, waves; `about`: `Bound`'s other fields."""
    width, hidden, _ = SHAPES[shape]
    arch, config, tokens = about["arch"], about["config"], TOKENS[shape]
    n, m, k = config["BLOCK_N"], config["BLOCK_M"], config["BLOCK_K"]
    processors, peak = PROCESSORS[arch], _FLOPS_A_CYCLE[arch]
    at_once = processors * (1 if about["persistent"] else about["programs"])
    copies = 2 if role == "hidden_backward" else 1
    found: dict[str, Any] = {}
    if role == "weight_grad":
        rows, columns = sorted((width, hidden), reverse=True)
        blocks = triton.cdiv(rows, n) * triton.cdiv(columns, m)
        slices = slices_of(blocks, triton.cdiv(tokens, k), processors)
        depth, tiles = triton.cdiv(tokens, slices), blocks * slices
        found["partial_bytes_per_token"] = 2 * 4 * slices * rows * columns / tokens
        traffic, useful = blocks * _ELEMENT * (n + m), 2 * rows * columns
    else:
        columns = hidden if role in ("hidden", "hidden_backward") else width
        depth = hidden if role in ("project", "dx") else width
        across = triton.cdiv(columns, m)
        tiles = triton.cdiv(tokens, n) * across
        traffic, useful = copies * _ELEMENT * depth * (across + columns / n), copies * 2 * columns * depth
    seconds = useful / (peak * processors * _CLOCK)  # per token, at peak
    tensor = copies * 2 * n * m * depth / peak
    # The hidden layer's two matmuls in the backward pass run one after the other, or in one loop of twice the work.
    turns = depth / k * (1 if config["TMA"] else copies)
    loop, outside = (config["num_warps"] / 4 * about[key] for key in ("loop_instructions", "outside_instructions"))
    loop *= turns
    overlaps = about["programs"] >= 2 or about["persistent"]
    return found | {
        "tensor_cycles": tensor,
        "loop_cycles": loop,
        "outside_cycles": outside,
        "serial": tensor / (max(tensor, loop) + outside),
        "overlapped": tensor / max(tensor, loop + outside) if overlaps else None,
        "l2_bytes_per_token": traffic,
        "by_l2": tuple(min(1.0, seconds / (traffic / rate)) for rate in L2_RATES),
        "last_wave": tiles / (triton.cdiv(tiles, at_once) * at_once),
    }
