"""Selected patches of uint8 images, normalised, as packed rows for the patch embedding's matmul.

    out[n, p] = level[n, p] · scale[p] + shift[p]

images (B, S, S, 3) uint8; patches and image_of_token (N,) int64 or None: all patches; scale and shift (P · P · 3,) for
a patch of P × P pixels; out (N, P · P · 3). A row holds its pixels in image order: line by line, channel last.
Arithmetic is fp32, or float64 for float64 results.

Fused (Triton): cutting, gathering, conversion of levels, affine map and rounding. Each selected level is read once and
its result written once, 3 bytes per level in half precision; other patches are not read. The matmul with the
embedding's weight is the library's. There is no gradient: images, scale and shift are constants.

Reference (plain PyTorch, below): gathers the levels, then normalises them: 21 bytes per level in four operators.

FLOPs and bytes: `patchify_flops`, `patchify_bytes`.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import resolve_backend, without_autocast
from ._lib.checks import check_floating, check_index, check_like, check_shape
from ._lib.jit import to_type
from ._lib.rows import launching, pieces, rows_a_program, rows_together

__all__ = ["patchify", "patchify_bytes", "patchify_flops", "patchify_reference"]


def patchify_flops(tokens: int, patch: int) -> int:
    """Return FLOPs: a multiplication and an addition per level."""
    return 2 * tokens * 3 * patch * patch


def patchify_bytes(tokens: int, patch: int, *, element: int = 2, indexed: bool = True) -> int:
    """Return minimum bytes moved: each level read once, each result written once, and two indices per patch.

    `element`: bytes per element of the result.
    """
    return tokens * (3 * patch * patch * (1 + element) + (16 if indexed else 0))


def patchify_reference(
    images: Tensor,
    patch: int,
    scale: Tensor,
    shift: Tensor,
    *,
    dtype: torch.dtype,
    patches: Tensor | None = None,
    image_of_token: Tensor | None = None,
) -> Tensor:
    """Compute `patchify` with PyTorch's operators. Arguments are not checked."""
    exact = torch.promote_types(dtype, torch.float32)
    levels = _gather(images, patch, patches, image_of_token)
    return torch.addcmul(shift.to(exact), levels.to(exact), scale.to(exact)).to(dtype)


def _gather(images: Tensor, patch: int, patches: Tensor | None, image_of_token: Tensor | None) -> Tensor:
    """Return the levels of the selected patches, uint8 (N, P · P · 3)."""
    batch, side = images.shape[:2]
    grid = side // patch
    strips = images.reshape(batch, grid, patch, grid, patch * 3)
    if patches is None or image_of_token is None:
        return strips.transpose(2, 3).reshape(batch * grid * grid, patch * patch * 3)
    if not patches.numel():
        return images.new_empty(0, patch * patch * 3)
    # A patch is `patch` strips of patch · 3 bytes; strip (b, row, line, column) is the
    # (((b · grid + row) · patch + line) · grid + column)-th.
    row = image_of_token * grid + patches // grid
    first = row * (patch * grid) + patches % grid
    lines = first[:, None] + torch.arange(0, patch * grid, grid, device=images.device)
    return strips.reshape(-1, patch * 3).index_select(0, lines.flatten()).view(-1, patch * patch * 3)


@triton.jit(do_not_specialize=["N", "B", "GRID", "patches_ptr", "image_ptr"])
@no_type_check
def patchify_kernel(
    images_ptr, patches_ptr, image_ptr, scale_ptr, shift_ptr, out_ptr,
    N, B, GRID,
    stride_xb, stride_xy, stride_on,
    HAS_INDEX: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[n] = level · scale + shift over the PATCH · PATCH · 3 levels of patch patches[n] of images[image[n]].

    images uint8 (B, GRID · PATCH, GRID · PATCH, 3), with contiguous pixel lines. Without an index: all patches of all
    images, in order. A patch out of range counts as NaN.
    """
    LINE: tl.constexpr = PATCH * 3
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    rows = o_n.to(tl.int64)
    if HAS_INDEX:
        patch = tl.load(patches_ptr + o_n, mask=m_n, other=0)
        image = tl.load(image_ptr + o_n, mask=m_n, other=0)
    else:
        patch = rows % (GRID * GRID)
        image = rows // (GRID * GRID)
    m_x = m_n & (patch >= 0) & (patch < GRID * GRID) & (image >= 0) & (image < B)
    first = image * stride_xb + (patch // GRID) * PATCH * stride_xy + (patch % GRID) * LINE
    for part in tl.static_range(PARTS):
        o = part * BLOCK_D + o_d
        m_d = o < PATCH * LINE
        p_levels = images_ptr + first[:, None] + ((o // LINE) * stride_xy + o % LINE)[None, :]
        level = tl.load(p_levels, mask=m_x[:, None] & m_d[None, :], other=0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        # Each row loads them itself: shared between rows, they would go through shared memory.
        scale = tl.load(scale_ptr + 0 * rows[:, None] + o[None, :], mask=m_d[None, :], other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + 0 * rows[:, None] + o[None, :], mask=m_d[None, :], other=0.0).to(tl.float32)
        value = tl.where(m_x[:, None], level * scale + shift, float("nan"))
        p_out = out_ptr + rows[:, None] * stride_on + o[None, :]
        tl.store(p_out, to_type(value, out_ptr.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])


def launch_patchify(
    images: Tensor, patches: Tensor | None, image_of_token: Tensor | None, scale: Tensor, shift: Tensor, patch: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Launch `patchify_kernel`: write out (N, P · P · 3)."""
    batch, side = images.shape[:2]
    images = images if images.stride()[2:] == (3, 1) else images.contiguous()
    block_d, parts = pieces(out.shape[1])
    block_n = rows_a_program(out.shape[1], 2)
    with launching(out):
        patchify_kernel[(triton.cdiv(out.shape[0], block_n),)](
            images_ptr=images, patches_ptr=None if patches is None else rows_together(patches),
            image_ptr=None if image_of_token is None else rows_together(image_of_token),
            scale_ptr=rows_together(scale), shift_ptr=rows_together(shift), out_ptr=out,
            N=out.shape[0], B=batch, GRID=side // patch,
            stride_xb=images.stride(0), stride_xy=images.stride(1), stride_on=out.stride(0),
            HAS_INDEX=patches is not None, PATCH=patch,
            BLOCK_N=block_n, BLOCK_D=block_d, PARTS=parts, num_warps=4,
        )  # fmt: skip


def _tokens(images: Tensor, patch: int, patches: Tensor | None) -> int:
    return images.shape[0] * (images.shape[1] // patch) ** 2 if patches is None else patches.shape[0]


@torch.library.custom_op("iwm_fast::patchify", mutates_args=())
def _operator(
    images: Tensor, patches: Tensor | None, image_of_token: Tensor | None, scale: Tensor, shift: Tensor, patch: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the packed rows (N, P · P · 3) in `dtype`."""
    out = torch.empty(_tokens(images, patch, patches), 3 * patch * patch, dtype=dtype, device=images.device)
    if out.numel():
        launch_patchify(images, patches, image_of_token, scale, shift, patch, out)
    return out


@_operator.register_fake
def _(
    images: Tensor, patches: Tensor | None, image_of_token: Tensor | None, scale: Tensor, shift: Tensor, patch: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return images.new_empty(_tokens(images, patch, patches), 3 * patch * patch, dtype=dtype)


@register_flop_formula(torch.ops.iwm_fast.patchify)
def _count(*_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * int(out_shape[0]) * int(out_shape[1])


def patchify(
    images: Tensor,
    patch: int,
    scale: Tensor,
    shift: Tensor,
    *,
    dtype: torch.dtype,
    patches: Tensor | None = None,
    image_of_token: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cut patches out of uint8 images and normalise their levels.

    Args:
        images: uint8 (B, S, S, 3); S is a multiple of `patch`.
        patch: P, the patch size in pixels.
        scale: (P · P · 3,), multiplies each level of a patch; floating, a constant.
        shift: (P · P · 3,), is added to it.
        dtype: of the result. Arithmetic is fp32, or float64 for a float64 result.
        patches: int64 (N,), row-major index of each selected patch in its image; None: all of them, N = B · (S / P)².
        image_of_token: int64 (N,), the image of each selected patch; required with `patches`.
        backend: "auto" (Triton on CUDA for fp32, fp16 and bf16), "reference" or "triton".

    Autocast has no effect: `dtype` is the result's.

    Returns:
        (N, P · P · 3), rows of pixels in image order. On CUDA a patch out of range is NaN.

    Raises:
        ValueError: an argument does not fit, or "triton" is given and cannot run; on the CPU also for a patch out of
            range.

    """
    _check_images(images, patch)
    for name, table in (("scale", scale), ("shift", shift)):
        check_floating(name, table, 1)
        check_shape(name, table, (3 * patch * patch,), "(P · P · 3,)")
        check_like(name, table, "images", images, dtype=table.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating type")
    if (patches is None) != (image_of_token is None):
        raise ValueError("patches and image_of_token come together: give both or neither")
    if patches is not None and image_of_token is not None:
        wanted, grid = patches.numel(), (images.shape[1] // patch) ** 2
        check_index("patches", patches, wanted, "(N,)", "the images' grid", images, grid)
        check_index("image_of_token", image_of_token, wanted, "(N,)", "images", images, images.shape[0])
    scale, shift = scale.detach(), shift.detach()
    if resolve_backend(backend, "images", images, dtype) == "triton":
        rows: Tensor = torch.ops.iwm_fast.patchify(images, patches, image_of_token, scale, shift, patch, dtype)
        return rows
    with without_autocast(images):
        return patchify_reference(
            images, patch, scale, shift, dtype=dtype, patches=patches, image_of_token=image_of_token
        )


def _check_images(images: Tensor, patch: int) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; they must be uint8 (B, S, S, 3)")
    if patch < 1 or images.shape[1] % patch:
        raise ValueError(f"patch is {patch}; it must divide the side of the images, {images.shape[1]}")
