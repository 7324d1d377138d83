"""Record the operators' launches without a GPU, by running the launchers on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from iwm_fast.kernels._lib.backend import recorded_launches
from iwm_fast.kernels._lib.norms import norm_backward, normalise
from iwm_fast.kernels._mlp import passes
from iwm_fast.kernels._mlp.workspace import workspace_bytes
from iwm_fast.kernels._tuning.candidates import candidates_of, possible
from iwm_fast.kernels._tuning.tuner import use_tuner
from iwm_fast.kernels.e4m3_rows import launch_e4m3
from iwm_fast.kernels.ema_update import launch_average
from iwm_fast.kernels.patchify import launch_patchify
from iwm_fast.kernels.predictor_input import launch_assembly, launch_assembly_backward
from iwm_fast.kernels.rope import launch_rope
from iwm_fast.kernels.sigreg import launch_sigreg_sums, launch_sigreg_sums_backward
from iwm_fast.kernels.stopgrad_l2 import launch_distance, launch_total

__all__ = [
    "PATCHES",
    "SHAPES",
    "TOKENS",
    "Launch",
    "Signature",
    "record_launches",
    "recording",
    "signature",
    "specialise",
]

Signature = tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]
# Width, hidden width and actions that the configurations train: predictor blocks with and without actions, the mask
# tokens' mixer (no normalisation, no residual), ViT-B's blocks.
SHAPES = {
    "block 384": (384, 1536, 16),
    "block 192": (192, 768, 16),
    "mixer 384": (384, 384, 16),
    "encoder 768": (768, 3072, 0),
}
# Tokens of a step at those sizes: 512 images of 196 tokens, and 256.
TOKENS = {"block 384": 100_352, "block 192": 100_352, "mixer 384": 100_352, "encoder 768": 50_176}
# Patch sizes of the configurations, and of ViT-H.
PATCHES = (4, 8, 14, 16)
# Widths and hidden widths of target encoders, ViT-B to ViT-H: operands in fp8, on architectures that have it.
E4M3_WIDTHS = (768, 1280, 3072, 5120)
# Heads and their width of encoders with rope: ViT-S to ViT-L, and ViT-H.
ROPE_HEADS = ((6, 64), (12, 64), (16, 80))
# Knots of SIGReg but 0: the default's, and as many as its registers take.
SIGREG_KNOTS = (8, 16)
_HAS_E4M3 = 89


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch: the kernel, its arguments by name, its options, and the work that it belongs to.

    shapes: `shape`, and those whose launch compiles to the same code.
    """

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    shape: str
    shapes: list[str] = field(default_factory=list)


class _EveryCandidate:
    """Replaces the tuner: launches all candidates of an architecture in turn, the library's kernels too."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def run(self, product: str, dtype: torch.dtype, _: tuple[int, int, int], call: Any, about: str) -> Any:
        found = [c for c in candidates_of(self.arch, product) if possible(c, self.arch, dtype.itemsize, about)]
        return [call(choice) for choice in found][-1]


@contextmanager
def recording(record: Callable[[JITFunction, dict[str, Any]], None]) -> Iterator[None]:
    """Pass each launch of a Triton kernel, with arguments and options by name, to `record` instead of a device."""

    def run(kernel: JITFunction, *_: Any, grid: Any, warmup: bool, **given: Any) -> None:
        record(kernel, given)

    before = JITFunction.run
    JITFunction.run = run
    try:
        with recorded_launches():
            yield
    finally:
        JITFunction.run = before


def record_launches(arch: str, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Return every distinct launch of all operators, forward and backward, at the sizes of SHAPES and PATCHES."""
    found: dict[str, Launch] = {}

    def record(kernel: JITFunction, given: dict[str, Any]) -> None:
        arguments = {name: given[name] for name in kernel.arg_names}
        options = {name: value for name, value in given.items() if name not in arguments}
        launch = Launch(kernel, arguments, options, shape)
        first = found.setdefault(f"{kernel.__name__} {signature(launch, arch)} {options}", launch)
        if shape not in first.shapes:
            first.shapes.append(shape)

    with recording(record), use_tuner(_EveryCandidate(arch)):
        for shape, launch in _works(arch, dtype).items():  # noqa: B007  (shape is read by `record`)
            launch()
    return list(found.values())


def _works(arch: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return the functions that launch, by the name that reports give them; all on meta tensors."""
    works: dict[str, Callable[[], None]] = {
        name: partial(_launch_block, *sizes, dtype) for name, sizes in SHAPES.items()
    }
    works |= {f"patches of {patch}": partial(_launch_patches, patch, dtype) for patch in PATCHES}
    if int(arch.removeprefix("sm_")) >= _HAS_E4M3:
        works |= {f"rows of {width} in e4m3": partial(_launch_e4m3, width, dtype) for width in E4M3_WIDTHS}
    works |= {f"{heads} heads of {width}": partial(_launch_rope, heads, width, dtype) for heads, width in ROPE_HEADS}
    works |= {f"{knots} knots": partial(_launch_sigreg, knots) for knots in SIGREG_KNOTS}
    return works | {
        "average by 4": partial(_launch_average, 64, dtype),
        "average by 1": partial(_launch_average, 63, dtype),
    }


def _empty(*shape: int, kind: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=kind, device="meta")


def _launch_patches(patch: int, dtype: torch.dtype) -> None:
    images, values = _empty(3, 8 * patch, 8 * patch, 3, kind=torch.uint8), 3 * patch * patch
    table = _empty(values, kind=torch.float32)
    for index in (_empty(63, kind=torch.int64), None):
        launch_patchify(images, index, index, table, table, patch, _empty(63, values, kind=dtype))


def _launch_e4m3(width: int, dtype: torch.dtype) -> None:
    codes, scale = _empty(63, width, kind=torch.uint8), _empty(63, 1, kind=torch.float32)
    for activation in ("none", "gelu"):
        launch_e4m3(_empty(63, width, kind=dtype), activation, codes, scale)


def _launch_sigreg(knots: int) -> None:
    p, grad_sums = _empty(63, 512, kind=torch.float32), _empty(2, knots, 512, kind=torch.float32)
    for rows in (None, _empty(1, kind=torch.int64)):
        launch_sigreg_sums(p, rows, 0.375, knots)
        launch_sigreg_sums_backward(p, rows, grad_sums, 0.375, _empty(63, 512, kind=torch.float32))


def _launch_rope(heads: int, width: int, dtype: torch.dtype) -> None:
    qkv, table = _empty(63, 3, heads, width, kind=dtype), _empty(196, width, kind=torch.float32)
    patches = _empty(63, kind=torch.int64)
    for inverse in (False, True):
        launch_rope(qkv[:, 0], qkv[:, 1], None, table, patches, qkv, inverse=inverse)
    q, k, v = (_empty(63, heads, width, kind=dtype) for _ in range(3))
    launch_rope(q, k, v, table, patches, qkv, inverse=True)


def _launch_average(elements: int, dtype: torch.dtype) -> None:
    averages = [_empty(elements, kind=torch.float32)]
    for copies in ([], [_empty(elements, kind=dtype)]):
        for unless in (None, _empty(kind=torch.float32)):
            launch_average(averages, averages, copies, 0.25, unless)


def _launch_block(width: int, hidden: int, actions: int, dtype: torch.dtype) -> None:
    """Launch the MLP and the loss, with 63 tokens, so that no kernel may rely on a round number."""
    empty = partial(_empty, kind=dtype)
    images = 3
    action = (empty(images, actions), empty(hidden, actions)) if actions else (None, None)
    norm = (None, None) if hidden == width else (empty(width), empty(width))
    cu_seqlens = _empty(images + 1, kind=torch.int32) if actions else None
    weights: tuple[Any, ...] = (
        empty(hidden, width), empty(hidden), empty(width, hidden), empty(width),
        *action, cu_seqlens, *norm, norm[0] is not None, 1e-6, "gelu",
    )  # fmt: skip
    for tokens, workspace in ((63, workspace_bytes()), (150, 1)):  # whole, and in chunks with a shorter last one
        forward: tuple[Any, ...] = (empty(tokens, width), *weights, workspace)
        passes.forward(*forward)
        backward: tuple[Any, ...] = (empty(tokens, width), *forward, True)
        passes.backward(*backward)
    tokens = 63
    loss = (empty(tokens, width), empty(200, width), _empty(tokens, kind=torch.int64), True, 1.0, 1e-6)
    grad = empty(tokens, width)
    sums = _empty(tokens, kind=torch.float32)
    launch_distance(*loss, sums=sums, grad=grad)
    launch_total(sums, 1.0, _empty(1, kind=torch.float32))
    for skip_one in (False, True):
        launch_distance(*loss, grad=grad, incoming=_empty(1, kind=torch.float32), skip_one=skip_one)
    _launch_stream(width, dtype)


def _launch_stream(width: int, dtype: torch.dtype) -> None:
    """Launch what runs around a block and before the first: the residual stream's LayerNorm, the predictor's input."""
    empty = partial(_empty, kind=dtype)
    x, row, patches = empty(63, width), empty(width), _empty(63, kind=torch.int64)
    for branch in (None, x):
        normalise(x, row, row, 1e-6, branch=branch, total=None if branch is None else x)
    norm_backward(x, x, row, x, x, 1e-6)
    position, place, joined = empty(196, width), _empty(126, kind=torch.int64), empty(126, width)
    launch_assembly(x, patches, position, place, row, patches, None, joined)
    launch_assembly_backward(joined, place, x, empty(0, width), 63)
    launch_assembly(x, patches, position, place, None, None, x, joined)
    launch_assembly_backward(joined, place, x, x, 0)


def specialise(kernel: JITFunction, given: dict[str, Any], arch: str) -> list[tuple[str, Any]]:
    """Return how Triton's launcher specialises a kernel for arguments and options by name.

    For each argument: its type, with its value if it is a constant, else with what is known of it ("D": a multiple of
    16).
    """
    return _binder(kernel, arch)(**given)[1]


@cache
def _binder(kernel: JITFunction, arch: str) -> Callable[..., Any]:
    backend = make_backend(GPUTarget("cuda", int(arch.removeprefix("sm_")), 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def signature(launch: Launch, arch: str) -> Signature:
    """Return types by name, constants and attributes by position, specialised as by Triton's launcher."""
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, (kind, known)) in enumerate(
        zip(launch.arguments, specialise(launch.kernel, launch.arguments, arch), strict=True)
    ):
        types[name] = kind
        if kind == "constexpr":
            constants[i,] = launch.arguments[name]
        elif known:
            attributes[i,] = CUDABackend.parse_attr(known)
    return types, constants, attributes
