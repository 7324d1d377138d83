"""How fast a compiled kernel can be at most, from its machine code: issue slots, tensor cores, waves, bytes from L2.

Of one tile on one SM, in cycles, with one instruction a cycle and scheduler (four of them) and 4,096 operations of the
tensor cores a cycle:

    T   tensor cores        2 · block_n · block_m · depth / 4096
    I   the main loop       warps / 4 · instructions of a turn · turns
    E   what is outside     warps / 4 · instructions of a tile that are not in it
    serial      T / (max(T, I) + E)       the epilogue of a tile waits for its loop, and the next loop for it
    overlapped  T / max(T, I + E)         the epilogue runs beside another tile's loop

The second is a bound only where that can be: where two programs fit an SM, or where one program walks over the tiles
and has asked for the next tile's operands before the epilogue. The bound by L2 is apart: the share of peak at which the
operands' bytes arrive at the rates of L2_RATES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from iwm_fast.kernels._tuning.candidates import PROCESSORS, slices_of

from .launches import SHAPES, TOKENS, Launch
from .sass import Code

__all__ = ["L2_RATES", "Bound", "bounds_of", "matrix_bound", "role_of"]

# Bytes a second from L2 to all SMs, not measured yet; and the clock at which it would be reached.
L2_RATES = (5.5e12, 7e12)
_FLOPS_A_CYCLE = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
_CLOCK = 1.755e9
_ELEMENT = 2
_MULTIPLIES = ("hidden", "project", "dx", "hidden_backward", "weight_grad")


@dataclass(frozen=True)
class Bound:
    """What `python -m iwm_fast.kernels.aot --bounds` prints of a kernel and a configuration."""

    kernel: str
    role: str
    arch: str
    shape: str
    config: dict[str, Any]
    wgmma: dict[str, int]
    loop_instructions: int
    outside_instructions: int
    loop_barriers: int
    # Of the loop and around it.
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
    # Share of peak at each of L2_RATES, were bytes from L2 all that takes time.
    by_l2: tuple[float, ...] | None = None
    last_wave: float | None = None
    # Partial sums of a weight gradient, written and read, a token.
    partial_bytes_per_token: float | None = None
    # What an activation adds to a kernel that reads and writes each number once.
    instructions_per_element: float | None = None

    @property
    def limit(self) -> float | None:
        """The least of the bounds, a share of peak: by issue slots and tensor cores, and by L2 at its higher rate."""
        if self.serial is None or self.by_l2 is None:
            return None
        return min(self.serial if self.overlapped is None else self.overlapped, self.by_l2[-1])


def role_of(launch: Launch) -> str:
    """What a kernel is launched for: hidden, project, dx, hidden_backward, weight_grad, norm_backward, ..."""
    name, given = launch.kernel.__name__.removesuffix("_kernel"), launch.arguments
    if name != "linear":
        return name
    if given["ACTIVATION"] != "none":
        return "hidden"
    return "project" if given["HAS_BIAS"] else "dx"


def bounds_of(launch: Launch, arch: str, code: Code, *, registers: int, spill_bytes: int, programs: int) -> list[Bound]:
    """The bounds of a compiled launch, for each of its shapes where it multiplies; none for a kernel without a loop."""
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
    """What can be said of a multiply of a shape: cycles, bounds, bytes, waves; `about`: `Bound`'s other fields."""
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
    seconds = useful / (peak * processors * _CLOCK)  # of a token, at peak
    tensor = copies * 2 * n * m * depth / peak
    # Both multiplies of the hidden layer's backward pass run one after the other, or in one loop of twice the work.
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
