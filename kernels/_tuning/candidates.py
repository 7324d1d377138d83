"""The block sizes that each architecture starts from, in order of preference, before anything has been measured.

They come from ahead-of-time compiles (`python -m iwm_fast.kernels.aot`): each fits the chip's shared memory and spills
no register. Which is fastest is for `tuner.py` to find out on the device.
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

    block_n × block_m is the block of the result that a program makes at a time, block_k the depth that it takes at a
    time. "triton": a block a program, operands by pointers. "tma": one program an SM walks over the blocks, operands by
    tensor descriptors, the epilogue in so many pieces.
    """

    by: str
    block_n: int = 0
    block_m: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 2
    pieces: int = 1

    def shared_bytes(self, element: int, operands: int = 1) -> int:
        """Shared memory of the operands' blocks in flight: what a pipelined multiply needs at least."""
        return operands * element * self.stages * self.block_k * (self.block_n + self.block_m)


# Bytes that one program may have (CUDA programming guide, technical specifications): A100, H100 and H200, B200.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
ARCHITECTURES = tuple(SHARED_LIMIT)
# SMs of A100, H100 or H200, B200.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
LIBRARY = Choice("library")


def _triton(*sizes: int) -> Choice:
    return Choice("triton", *sizes)


def _tma(*sizes: int) -> Choice:
    return Choice("tma", *sizes)


# product -> architecture -> (block_n, block_m, block_k, warps, stages[, pieces]) ..., the best bound first
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
# Most slices of a weight gradient's rows: partial sums are written and read once each. A result of six blocks, as of
# 768 × 192, needs 20 to fill the last wave of 132 SMs.
_MOST_SLICES = 32
# The interpreter multiplies in NumPy, where a block costs as much as its Python: large blocks, and no pipeline.
_INTERPRETER = (_triton(64, 128, 128, 4, 1), _tma(64, 128, 128, 4, 1, 2))


def candidates_of(architecture: str, product: str) -> list[Choice]:
    """Candidates for a product; an architecture without a list of its own takes the newest older one's."""
    if architecture == "interpreter":
        return [*_INTERPRETER, LIBRARY]
    number = int(architecture.removeprefix("sm_"))
    older = [a for a in ARCHITECTURES if int(a.removeprefix("sm_")) <= number]
    return [*(_BLOCKS[product][older[-1]] if older else []), LIBRARY]


def possible(choice: Choice, architecture: str, element: int, about: str) -> bool:
    """Whether a choice can be made for operands of `element` bytes; `about` is the tuner's: "tma ..." or "any ...".

    Descriptors need operands that they can point at, in half precision: the blocks are chosen for it.
    From sm_100 on, Triton (3.6 to 3.7) fails to compile a persistent kernel that adds an action's matmul to another.
    """
    if choice.by != "tma":
        return True
    layout, _, kind = about.partition(" ")
    newest = architecture != "interpreter" and int(architecture.removeprefix("sm_")) >= 100
    return layout == "tma" and element == 2 and not (newest and kind.startswith("action"))


def read_choice(entry: Any) -> Choice | None:
    """The choice of an entry of a table of choices; None where the entry is of another kind."""
    found = entry.get("choice") if isinstance(entry, dict) else None
    if not isinstance(found, dict) or not found.keys() <= {field.name for field in fields(Choice)}:
        return None
    numbers = [value for name, value in found.items() if name != "by"]
    known = isinstance(found.get("by"), str) and all(type(value) is int for value in numbers)
    return Choice(**found) if known else None


def slices_of(blocks: int, most: int, processors: int) -> int:
    """The fewest slices of the rows whose programs fill the last wave to nine tenths, or as well as can be.

    blocks: of the result, a program each for every slice. most: slices that the rows can be cut into.
    """

    def filled(slices: int) -> float:
        programs = blocks * slices
        return programs / (-(-programs // processors) * processors)

    counts = range(1, max(1, min(most, _MOST_SLICES)) + 1)
    return next((s for s in counts if filled(s) >= 0.9), max(counts, key=filled))
