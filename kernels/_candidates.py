"""The block sizes that each architecture starts from, in order of preference, before anything has been measured.

They come from ahead-of-time compiles (`python -m iwm_fast.kernels.aot`): each fits the chip's shared memory and spills
no register. Which is fastest is for `_tuning` to find out on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "LIBRARY", "PRODUCTS", "SHARED_LIMIT", "STAGED", "Choice", "candidates_of"]


@dataclass(frozen=True)
class Choice:
    """An implementation: "triton" or "fused" with its block sizes, "library" (cuBLAS) or "staged" with none.

    block_n × block_m is the block of the result that a program makes, block_k the depth that it takes at a time. Of a
    whole MLP, "staged" is one product after the other, and "fused" one kernel: block_n tokens, block_m hidden units at
    a time, block_k of the width in each of three pieces.
    """

    by: str
    block_n: int = 0
    block_m: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 2

    def shared_bytes(self, element: int) -> int:
        """Shared memory of the operands' blocks in flight: what a pipelined product needs at least."""
        if self.by == "fused":
            return 3 * element * self.block_k * (self.block_n + self.stages * self.block_m)
        return element * self.stages * self.block_k * (self.block_n + self.block_m)


# Bytes that one program may have (CUDA programming guide, technical specifications): A100, H100 and H200, B200.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
ARCHITECTURES = tuple(SHARED_LIMIT)
LIBRARY = Choice("library")
STAGED = Choice("staged")


def _triton(*sizes: int) -> Choice:
    return Choice("triton", *sizes)


def _fused(*sizes: int) -> Choice:
    return Choice("fused", *sizes)


# product -> architecture -> (block_n, block_m, block_k, warps, stages) ... Larger blocks than these spill: GELU and the
# images' biases need registers beside the accumulator (128 × 256 spills 456 bytes on sm_90, benchmarks/NOTES.md).
_BLOCKS: dict[str, dict[str, list[Choice]]] = {
    # act(x · wᵀ + bias[image])
    "hidden": {
        "sm_80": [_triton(128, 128, 32, 8, 4), _triton(64, 128, 64, 8, 3), _triton(128, 64, 32, 4, 4)],
        "sm_90": [
            _triton(128, 128, 64, 8, 4),
            _triton(64, 256, 64, 8, 3),
            _triton(128, 128, 32, 8, 4),
            _triton(128, 64, 64, 4, 4),
            _triton(64, 128, 64, 4, 4),
        ],
        "sm_100": [_triton(128, 128, 64, 8, 4), _triton(64, 256, 64, 8, 3), _triton(128, 64, 64, 4, 4)],
    },
    # x · wᵀ + bias + residual
    "project": {
        "sm_80": [_triton(128, 128, 64, 8, 3), _triton(64, 128, 64, 8, 3), _triton(64, 128, 32, 4, 4)],
        "sm_90": [
            _triton(128, 128, 64, 8, 4),
            _triton(64, 256, 64, 8, 3),
            _triton(64, 128, 64, 4, 4),
            _triton(128, 64, 64, 4, 4),
        ],
        "sm_100": [_triton(128, 128, 64, 8, 4), _triton(64, 256, 64, 8, 3), _triton(128, 64, 64, 4, 4)],
    },
    # x · wᵀ
    "plain": {
        "sm_80": [_triton(128, 128, 32, 8, 4), _triton(64, 128, 32, 4, 4), _triton(64, 256, 32, 8, 3)],
        "sm_90": [_triton(128, 256, 64, 8, 3), _triton(128, 128, 64, 4, 4), _triton(128, 128, 64, 8, 4)],
        "sm_100": [_triton(128, 256, 64, 8, 3), _triton(128, 128, 64, 8, 4)],
    },
    "hidden_backward": {
        "sm_80": [_triton(64, 128, 32, 8, 4), _triton(128, 64, 32, 8, 4), _triton(64, 64, 32, 4, 4)],
        "sm_90": [
            _triton(128, 128, 64, 16, 3),
            _triton(128, 64, 64, 8, 3),
            _triton(64, 128, 64, 8, 3),
            _triton(64, 64, 64, 4, 3),
        ],
        "sm_100": [_triton(128, 128, 64, 8, 3), _triton(128, 64, 64, 8, 3), _triton(64, 128, 64, 8, 3)],
    },
    "weight_grad": {
        "sm_80": [_triton(128, 128, 32, 8, 4), _triton(128, 128, 32, 4, 4), _triton(64, 128, 32, 4, 4)],
        "sm_90": [_triton(128, 256, 64, 8, 3), _triton(128, 128, 64, 4, 3), _triton(128, 128, 64, 8, 3)],
        "sm_100": [_triton(128, 256, 64, 8, 3), _triton(128, 128, 64, 4, 3), _triton(128, 128, 64, 8, 3)],
    },
}
# The whole forward pass at a width of D: "forward D". Two products first, until a measurement says otherwise: with 64
# tokens a program the fused kernel streams 4 · D · H / 64 bytes of weights a token from L2, 37 KB at D = 384.
_WHOLE: dict[str, dict[str, list[Choice]]] = {
    "forward 192": {
        "sm_80": [STAGED, _fused(64, 32, 64, 8, 1), _fused(32, 64, 64, 4, 2)],
        "sm_90": [STAGED, _fused(128, 64, 64, 8, 1), _fused(64, 64, 64, 8, 2), _fused(128, 32, 64, 8, 2)],
        "sm_100": [STAGED, _fused(128, 32, 64, 8, 2)],
    },
    "forward 384": {
        "sm_80": [STAGED, _fused(64, 32, 128, 8, 2)],
        "sm_90": [STAGED, _fused(64, 32, 128, 8, 2)],
        "sm_100": [STAGED, _fused(64, 32, 128, 8, 2)],
    },
}
PRODUCTS = (*_BLOCKS, *_WHOLE)
# The interpreter multiplies in NumPy, where a block costs as much as its Python: large blocks, and no pipeline.
_INTERPRETER = _triton(64, 128, 128, 4, 1)


def candidates_of(architecture: str, product: str) -> list[Choice]:
    """Candidates for a product; an architecture without a list of its own takes the newest older one's."""
    whole = product.startswith("forward ")
    if architecture == "interpreter":
        return [STAGED] if whole else [_INTERPRETER, LIBRARY]
    number = int(architecture.removeprefix("sm_"))
    older = [a for a in ARCHITECTURES if int(a.removeprefix("sm_")) <= number]
    if whole:
        return _WHOLE[product][older[-1]] if older and product in _WHOLE else [STAGED]
    return [*(_BLOCKS[product][older[-1]] if older else []), LIBRARY]
