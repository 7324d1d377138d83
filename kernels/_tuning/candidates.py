"""Block sizes to start from on each architecture, in order of preference, before anything is measured.

They come from ahead-of-time compilation (`python -m iwm_fast.kernels.aot`): each fits the chip's shared memory and
spills no register. `tuner.py` finds the fastest on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = [
    "ARCHITECTURES",
    "LIBRARY",
    "PROCESSORS",
    "PRODUCTS",
    "SHARED_LIMIT",
    "Choice",
    "candidates_of",
    "possible",
    "read_choice",
    "slices_of",
]


@dataclass(frozen=True)
class Choice:
    """An implementation: "triton" or "tma" with its block sizes, or "library" (cuBLAS) with none.

    block_n × block_m is the tile of the result that a program computes, block_k the depth per iteration. "triton": one
    tile per program, operands by pointers. "tma": one persistent program per SM iterates over tiles, operands by tensor
    descriptors, the epilogue in `pieces` pieces.
    """

    by: str
    block_n: int = 0
    block_m: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 2
    pieces: int = 1

    def shared_bytes(self, element: int, operands: int = 1) -> int:
        """Return the shared memory of the operands' blocks in flight, the minimum of a pipelined matmul."""
        return operands * element * self.stages * self.block_k * (self.block_n + self.block_m)


# Shared memory per program in bytes (CUDA programming guide, technical specifications): A100, H100 and H200, B200.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
ARCHITECTURES = tuple(SHARED_LIMIT)
# SMs of A100, H100 or H200, B200.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
LIBRARY = Choice("library")


def _triton(*sizes: int) -> Choice:
    return Choice("triton", *sizes)


def _tma(*sizes: int) -> Choice:
    return Choice("tma", *sizes)


# matmul -> architecture -> (block_n, block_m, block_k, warps, stages[, pieces]) ..., the best bound first
# (`python -m iwm_fast.kernels.aot --bounds`).
_BLOCKS: dict[str, dict[str, list[Choice]]] = {
    # act( x · wᵀ + bias + action[image] · w_actionᵀ )
    "hidden": {
        "sm_80": [_triton(128, 128, 32, 8, 4), _triton(64, 128, 64, 8, 3), _triton(128, 64, 32, 4, 4)],
        "sm_90": [_tma(256, 128, 64, 8, 3, 2), _triton(128, 128, 64, 8, 3), _triton(64, 128, 64, 4, 4)],
        "sm_100": [_tma(128, 128, 64, 8, 3, 1), _triton(128, 128, 64, 8, 3), _triton(64, 128, 64, 4, 4)],
    },
    # x · wᵀ + bias + residual
    "project": {
        "sm_80": [_triton(128, 128, 64, 8, 3), _triton(64, 128, 64, 8, 3), _triton(64, 128, 32, 4, 4)],
        "sm_90": [_tma(256, 128, 64, 8, 3, 2), _triton(128, 128, 64, 8, 3), _triton(64, 128, 64, 4, 4)],
        "sm_100": [_tma(128, 128, 64, 8, 3, 1), _triton(128, 128, 64, 8, 3), _triton(64, 128, 64, 4, 4)],
    },
    # x · w, into fp32
    "plain": {
        "sm_80": [_triton(128, 128, 32, 8, 4), _triton(64, 128, 32, 4, 4), _triton(64, 256, 32, 8, 3)],
        "sm_90": [_tma(256, 128, 64, 8, 3, 2), _triton(128, 128, 64, 8, 3), _triton(128, 128, 64, 4, 4)],
        "sm_100": [_tma(128, 128, 64, 8, 3, 1), _triton(128, 128, 64, 8, 3)],
    },
    "hidden_backward": {
        "sm_80": [_triton(64, 128, 32, 8, 3), _triton(128, 64, 32, 8, 3), _triton(64, 64, 32, 4, 3)],
        "sm_90": [_tma(128, 128, 64, 8, 2, 2), _triton(128, 64, 64, 8, 2), _triton(64, 64, 64, 4, 2)],
        "sm_100": [_tma(128, 64, 64, 8, 2), _triton(128, 64, 64, 8, 2), _triton(64, 64, 64, 4, 2)],
    },
    "weight_grad": {
        "sm_80": [_triton(128, 128, 32, 8, 4), _triton(128, 64, 32, 4, 4), _triton(64, 128, 32, 4, 4)],
        "sm_90": [_tma(128, 256, 64, 8, 3), _triton(128, 256, 64, 8, 3), _triton(128, 128, 64, 8, 3)],
        "sm_100": [_tma(128, 256, 64, 8, 3), _triton(128, 128, 64, 8, 3)],
    },
}
PRODUCTS = tuple(_BLOCKS)
# Most slices of a weight gradient's rows: each partial sum is written and read once. A result of six blocks, such as
# 768 × 192, needs 20 to fill the last wave of 132 SMs.
_MOST_SLICES = 32
# The interpreter multiplies in NumPy and pays Python's overhead per block: large blocks, and no pipeline.
_INTERPRETER = (_triton(64, 128, 128, 4, 1), _tma(64, 128, 128, 4, 1, 2))


def candidates_of(architecture: str, product: str) -> list[Choice]:
    """Return the candidates for a matmul; an architecture without its own list uses the newest older one's."""
    if architecture == "interpreter":
        return [*_INTERPRETER, LIBRARY]
    number = int(architecture.removeprefix("sm_"))
    older = [a for a in ARCHITECTURES if int(a.removeprefix("sm_")) <= number]
    return [*(_BLOCKS[product][older[-1]] if older else []), LIBRARY]


def possible(choice: Choice, architecture: str, element: int, about: str) -> bool:
    """Return whether a choice works for operands of `element` bytes; `about` is the tuner's: "tma ..." or "any ...".

    Descriptors need operands that they can address, in half precision, for which the blocks are chosen.
    From sm_100 on, Triton (3.6 to 3.7) fails to compile a persistent kernel that adds an action's matmul to another.
    """
    if choice.by != "tma":
        return True
    layout, _, kind = about.partition(" ")
    newest = architecture != "interpreter" and int(architecture.removeprefix("sm_")) >= 100
    return layout == "tma" and element == 2 and not (newest and kind.startswith("action"))


def read_choice(entry: Any) -> Choice | None:
    """Read a table's entry; return None if it has another form."""
    found = entry.get("choice") if isinstance(entry, dict) else None
    if not isinstance(found, dict) or not found.keys() <= {field.name for field in fields(Choice)}:
        return None
    numbers = [value for name, value in found.items() if name != "by"]
    known = isinstance(found.get("by"), str) and all(type(value) is int for value in numbers)
    return Choice(**found) if known else None


def slices_of(blocks: int, most: int, processors: int) -> int:
    """Return the fewest row slices whose programs fill the last wave to 90 %, or else as well as possible.

    blocks: tiles of the result, one program each per slice. most: the maximum number of slices.
    """

    def filled(slices: int) -> float:
        programs = blocks * slices
        return programs / (-(-programs // processors) * processors)

    counts = range(1, max(1, min(most, _MOST_SLICES)) + 1)
    return next((s for s in counts if filled(s) >= 0.9), max(counts, key=filled))
