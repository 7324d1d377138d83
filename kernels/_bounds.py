"""How fast a compiled kernel can be at most, from its machine code: issue slots, tensor cores, waves, bytes from L2.

Of one tile on one SM, in cycles, with one instruction a cycle and scheduler (four of them) and 4,096 operations of the
tensor cores a cycle:

    T   tensor cores        2 · block_n · block_m · depth / 4096
    I   the main loop       warps / 4 · instructions of a turn · turns
    E   what is outside     warps / 4 · instructions of a tile that are not in it
    serial      T / (max(T, I) + E)       the epilogue of a tile waits for its loop, and the next loop for it
    overlapped  T / max(T, I + E)         the epilogue runs beside another tile's loop

The second is a bound only where that can be: where two programs fit an SM, or where one program walks over the tiles and
has asked for the next tile's operands before the epilogue. Times by L2's rate are apart: bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from ._launches import SHAPES, TOKENS, Launch
from ._sass import Code

__all__ = ["L2_RATES", "PROCESSORS", "Bound", "bound_of", "role_of"]

# SMs of A100, H200 and B200.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
# Bytes a second from L2 to all SMs, not measured yet; and the clock at which it would be reached.
L2_RATES = (5.5e12, 7e12)
_FLOPS_A_CYCLE = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192}
_CLOCK = 1.755e9
_ELEMENT = 2


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


def role_of(launch: Launch) -> str:
    """What a kernel is launched for: hidden, project, dx, hidden_backward, weight_grad, norm_backward, ..."""
    name, given = launch.kernel.__name__.removesuffix("_kernel"), launch.arguments
    if name != "linear":
        return name
    if given["ACTIVATION"] != "none":
        return "hidden"
    return "project" if given["HAS_BIAS"] else "dx"


def bound_of(launch: Launch, arch: str, code: Code, *, registers: int, spill_bytes: int, programs: int) -> Bound | None:
    """The bounds of a compiled launch; None for a kernel without a loop."""
    role = role_of(launch)
    multiplies = role in ("hidden", "project", "dx", "hidden_backward", "weight_grad")
    loop = code.loop(matrix=multiplies)
    if loop is None:
        return None
    given = launch.arguments
    config = {k: v for k, v in given.items() if k.startswith(("BLOCK_", "PARTS", "PIECES", "TMA"))} | launch.options
    about: dict[str, Any] = {
        "kernel": launch.kernel.__name__, "role": role, "arch": arch, "shape": launch.shape, "config": config,
        "wgmma": code.matrix_shapes, "loop_instructions": loop.instructions, "outside_instructions": loop.outside,
        "loop_barriers": loop.barriers, "registers": registers, "spill_bytes": spill_bytes, "programs": programs,
        "persistent": loop.persistent,
    }  # fmt: skip
    if not multiplies or launch.shape not in SHAPES:
        return Bound(**about)
    return Bound(**about, **_matrix(launch, role, arch, about))


def _matrix(launch: Launch, role: str, arch: str, about: dict[str, Any]) -> dict[str, Any]:
    width, hidden, _ = SHAPES[launch.shape]
    tokens, given = TOKENS[launch.shape], launch.arguments
    n, m, k = given["BLOCK_N"], given["BLOCK_M"], given["BLOCK_K"]
    processors, copies = PROCESSORS[arch], 1
    persistent = about["persistent"]
    at_once = processors * (1 if persistent else about["programs"])
    found: dict[str, Any] = {}
    if role == "weight_grad":
        from ._launch_products import slices_of

        rows, columns = sorted((width, hidden), reverse=True)
        blocks = triton.cdiv(rows, n) * triton.cdiv(columns, m)
        slices = slices_of(blocks, triton.cdiv(tokens, k), processors)
        depth, tiles = triton.cdiv(tokens, slices), blocks * slices
        found["partial_bytes_per_token"] = 2 * 4 * slices * rows * columns / tokens
    else:
        columns = {"hidden": hidden, "hidden_backward": hidden}.get(role, width)
        depth = {"project": hidden, "dx": hidden}.get(role, width)
        copies = 2 if role == "hidden_backward" else 1
        tiles = triton.cdiv(tokens, n) * triton.cdiv(columns, m)
        across = triton.cdiv(columns, m)
        found["l2_bytes_per_token"] = copies * _ELEMENT * depth * (across + columns / n)
        useful = copies * 2 * columns * depth / (_FLOPS_A_CYCLE[arch] * processors * _CLOCK)
        found["by_l2"] = tuple(useful / (found["l2_bytes_per_token"] / rate) for rate in L2_RATES)
    tensor = copies * 2 * n * m * depth / _FLOPS_A_CYCLE[arch]
    # Both multiplies of the hidden layer's backward pass run one after the other, or in one loop of twice the work.
    turns = depth / k * (copies if not given["TMA"] else 1)
    loop, outside = (
        about["config"]["num_warps"] / 4 * about[key] for key in ("loop_instructions", "outside_instructions")
    )
    loop *= turns
    overlaps = about["programs"] >= 2 or persistent
    return found | {
        "tensor_cycles": tensor,
        "loop_cycles": loop,
        "outside_cycles": outside,
        "serial": tensor / (max(tensor, loop) + outside),
        "overlapped": tensor / max(tensor, loop + outside) if overlaps else None,
        "last_wave": tiles / (triton.cdiv(tiles, at_once) * at_once),
    }
