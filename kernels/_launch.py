"""The kernels of `_products`, `_norms` and `_rows` as functions on tensors: grids, strides, and cuBLAS where it wins.

All tensors are of one device. Rows lie in one piece each (`rows_together`). Nothing here allocates more than it
returns, but for the slices of a weight gradient. Every reduction is in a fixed order: the same inputs give the same
bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import triton
from torch import Tensor

from ._backend import without_autocast
from ._candidates import Choice
from ._norms import norm_backward_kernel, norm_kernel
from ._products import fused_mlp_kernel, hidden_backward_kernel, linear_kernel, weight_grad_kernel
from ._rows import activate_kernel, segment_sum_kernel
from ._tuning import tuner

__all__ = [
    "fused_mlp",
    "hidden_backward",
    "launching",
    "linear",
    "norm_backward",
    "normalise",
    "pieces",
    "rows_a_program",
    "rows_a_sum",
    "rows_together",
    "segment_sum",
    "weight_grad",
]

# Programs that run side by side share this many rows of blocks in L2 (Triton's matrix-product tutorial, 6 to 8).
_GROUP = 8
# Rows of one segment where a column sum has no images to go by.
_SUM_ROWS = 256
# Most programs that sum rows beside other work. Each writes a row of sums, which a second stage reads: at 50,176 rows
# 4 % of the bytes of LN's backward pass, where a program for every four rows of 384 would move half as many again.
_SUM_PROGRAMS = 1024
# Values a program of a row kernel holds: 4 warps with 64 registers of them a lane. More spills.
_HELD = 4 * 32 * 64


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """What an operator runs in: the device of `x`, whichever is the current one, and autocast off."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext(), without_autocast(x):
        yield


def rows_together(x: Tensor) -> Tensor:
    """`x` (N, D) or (D,), or a copy of it, with each row in one piece: how kernels read all but weights."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _precision() -> str:
    """How fp32 operands are multiplied: what torch.set_float32_matmul_precision says."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def pieces(width: int) -> tuple[int, int]:
    """(BLOCK_D, PARTS) that cover a row with the fewest idle lanes: 384 is 3 × 128, 768 is 3 × 256."""
    whole = triton.next_power_of_2(width)
    for parts in (1, 3, 5, 7):
        block = max(16, triton.next_power_of_2(triton.cdiv(width, parts)))
        if block * parts < whole:
            return block, parts
    return max(16, whole), 1


def rows_a_program(width: int, copies: int) -> int:
    """Rows that a row kernel holds at once, with so many values for each number of a row."""
    return max(1, min(16, _HELD // (copies * triton.next_power_of_2(width))))


def rows_a_sum(rows: int, block_n: int) -> int:
    """Rows that a program sums beside other work, a multiple of block_n, so that there are few programs."""
    return block_n * triton.cdiv(triton.cdiv(rows, block_n), _SUM_PROGRAMS)


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, branch: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """LN(x) (N, D) of x's type, or LN(x + branch), that sum then written to `total` (N, D)."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block_d, parts = pieces(width)
    block_n = rows_a_program(width, 2)
    norm_kernel[(triton.cdiv(rows, block_n),)](
        x_ptr=x, branch_ptr=branch, weight_ptr=weight, bias_ptr=bias, total_ptr=total, out_ptr=out,
        N=rows, D=width,
        stride_xn=x.stride(0), stride_bn=0 if branch is None else branch.stride(0),
        stride_tn=0 if total is None else total.stride(0), stride_on=out.stride(0),
        eps=eps,
        HAS_BRANCH=branch is not None,
        BLOCK_N=block_n, BLOCK_D=block_d, PARTS=parts, num_warps=4,
    )  # fmt: skip
    return out


def norm_backward(
    dnormed: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None, dx: Tensor, eps: float
) -> Tensor:
    """Write LN's gradient, plus `residual`, to dx (N, D), and return those of weight and bias, fp32 (2, D)."""
    rows, width = x.shape
    block_d, parts = pieces(width)
    block_n = rows_a_program(width, 4)
    depth = rows_a_sum(rows, block_n)
    programs = triton.cdiv(rows, depth)
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    norm_backward_kernel[(programs,)](
        dnormed_ptr=dnormed, x_ptr=x, weight_ptr=weight, residual_ptr=residual, dx_ptr=dx, dweight_ptr=sums[0],
        dbias_ptr=sums[1],
        N=rows, D=width, ROWS=depth,
        stride_gn=dnormed.stride(0), stride_xn=x.stride(0), stride_rn=0 if residual is None else residual.stride(0),
        stride_dn=dx.stride(0),
        eps=eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=block_n, BLOCK_D=block_d, PARTS=parts, num_warps=4,
    )  # fmt: skip
    return sums.sum(dim=1)


def segment_sum(x: Tensor, bounds: Tensor | None, out: Tensor) -> None:
    """Add to fp32 out (segments, M) the sum of x's rows (N, M) from bounds[i] to bounds[i + 1], int32 (segments + 1,).

    Without bounds, `out` has one row, and gets the sum of all rows.
    """
    rows, width = x.shape
    target = out
    if bounds is None:
        segments = max(1, triton.cdiv(rows, _SUM_ROWS))
        bounds = torch.arange(segments + 1, dtype=torch.int32, device=x.device).mul_(_SUM_ROWS).clamp_(max=rows)
        target = torch.zeros(segments, width, dtype=torch.float32, device=x.device)
    block_m = min(128, max(16, triton.next_power_of_2(width)))
    segment_sum_kernel[(target.shape[0], triton.cdiv(width, block_m))](
        x_ptr=x, bounds_ptr=bounds, out_ptr=target,
        M=width,
        stride_xn=x.stride(0),
        BLOCK_N=32, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    if target is not out:
        out += target.sum(dim=0, keepdim=True)


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, *, image: Tensor | None = None,
    residual: Tensor | None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """Write out (N, M) = [residual +] act( x · wᵀ + bias[image] ) and return it.

    x (N, K), w (M, K) of any strides, bias (M,) or fp32 (images, M) with image int32 (N,).
    """

    def call(choice: Choice) -> Tensor:
        if choice.by == "library":
            return _library_linear(x, w, bias, out, image, residual, activation)
        rows, columns = out.shape
        blocks = triton.cdiv(rows, choice.block_n) * triton.cdiv(columns, choice.block_m)
        linear_kernel[(blocks,)](
            x_ptr=x, w_ptr=w, bias_ptr=bias, image_ptr=image, residual_ptr=residual, out_ptr=out,
            N=rows, M=columns, K=x.shape[1],
            stride_xn=x.stride(0), stride_wm=w.stride(0), stride_wk=w.stride(1),
            stride_bi=columns, stride_rn=0 if residual is None else residual.stride(0), stride_on=out.stride(0),
            HAS_BIAS=bias is not None, PER_IMAGE=image is not None, HAS_RESIDUAL=residual is not None,
            ACTIVATE=activation is not None, TANH=activation == "gelu_tanh", PRECISION=_precision(),
            BLOCK_N=choice.block_n, BLOCK_M=choice.block_m, BLOCK_K=choice.block_k, GROUP=_GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return out

    product = "hidden" if activation is not None else "plain" if bias is None and residual is None else "project"
    return tuner(x.device).run(product, x.dtype, (*out.shape, x.shape[1]), call)


def _library_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, image: Tensor | None, residual: Tensor | None,
    activation: str | None,
) -> Tensor:  # fmt: skip
    product = torch.mm(x, w.t())
    if activation is not None and bias is not None:
        _activate(product, None, bias, image, activation)
        return out.copy_(product)
    total = product.to(torch.promote_types(out.dtype, torch.float32))
    for part in (bias, residual):
        total = total if part is None else total + part
    return out.copy_(total)


def _activate(u: Tensor, d: Tensor | None, bias: Tensor, image: Tensor | None, activation: str) -> None:
    """Turn u (N, M) into act(u + bias[image]), and d (N, M) into the gradient through it, in place."""
    assert d is None or d.stride() == u.stride()
    rows, columns = u.shape
    activate_kernel[(triton.cdiv(rows, 16), triton.cdiv(columns, 128))](
        u_ptr=u, d_ptr=d, bias_ptr=bias, image_ptr=image,
        N=rows, M=columns,
        stride_un=u.stride(0), stride_bi=columns,
        PER_IMAGE=image is not None, HAS_GRADIENT=d is not None, TANH=activation == "gelu_tanh",
        BLOCK_N=16, BLOCK_M=128, num_warps=4,
    )  # fmt: skip


def fused_mlp(
    x: Tensor, w_in: Tensor, bias: Tensor, image: Tensor | None, w_out: Tensor, b_out: Tensor,
    norm: tuple[Tensor, Tensor] | None, out: Tensor, *, residual: bool, eps: float, activation: str, choice: Choice,
) -> Tensor:  # fmt: skip
    """Write out (N, D), the whole MLP of x (N, D), by one kernel, and return it; w_in (H, D), w_out (D, H)."""
    rows, width = x.shape
    w_in, w_out = rows_together(w_in), rows_together(w_out)
    fused_mlp_kernel[(triton.cdiv(rows, choice.block_n),)](
        x_ptr=x, w_in_ptr=w_in, bias_ptr=bias, image_ptr=image, w_out_ptr=w_out, b_out_ptr=b_out,
        norm_weight_ptr=norm and norm[0], norm_bias_ptr=norm and norm[1], out_ptr=out,
        N=rows, H=w_in.shape[0], D=width,
        stride_xn=x.stride(0), stride_wih=w_in.stride(0), stride_bi=w_in.shape[0], stride_woo=w_out.stride(0),
        stride_on=out.stride(0),
        eps=eps,
        HAS_NORM=norm is not None, PER_IMAGE=image is not None, HAS_RESIDUAL=residual,
        TANH=activation == "gelu_tanh", PRECISION=_precision(),
        BLOCK_N=choice.block_n, BLOCK_M=choice.block_m, BLOCK_D=choice.block_k,
        PARTS=triton.cdiv(width, choice.block_k),
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    return out


def hidden_backward(
    x: Tensor, w_in: Tensor, bias: Tensor, image: Tensor | None, dout: Tensor, w_out: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """act(u) and (dout · w_out) ∘ act'(u), of u = x · w_inᵀ + bias[image], both (N, H) of x's type.

    x (N, D), w_in (H, D), bias fp32 (images, H) or (H,), dout (N, Do), w_out (Do, H).
    """
    rows, units = x.shape[0], w_in.shape[0]

    def call(choice: Choice) -> tuple[Tensor, Tensor]:
        if choice.by == "library":
            u, d = torch.mm(x, w_in.t()), torch.mm(dout, w_out)
            _activate(u, d, bias, image, activation)
            return u, d
        hidden, dhidden = torch.empty(2, rows, units, dtype=x.dtype, device=x.device).unbind()
        hidden_backward_kernel[(triton.cdiv(rows, choice.block_n) * triton.cdiv(units, choice.block_m),)](
            x_ptr=x, w_in_ptr=w_in, bias_ptr=bias, image_ptr=image, dout_ptr=dout, w_out_ptr=w_out,
            hidden_ptr=hidden, dhidden_ptr=dhidden,
            N=rows, H=units, D=x.shape[1], DO=dout.shape[1],
            stride_xn=x.stride(0), stride_wih=w_in.stride(0), stride_wid=w_in.stride(1), stride_bi=units,
            stride_dn=dout.stride(0), stride_woh=w_out.stride(1), stride_woo=w_out.stride(0), stride_hn=units,
            PER_IMAGE=image is not None, TANH=activation == "gelu_tanh", PRECISION=_precision(),
            BLOCK_N=choice.block_n, BLOCK_M=choice.block_m, BLOCK_K=choice.block_k, GROUP=_GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return hidden, dhidden

    return tuner(x.device).run("hidden_backward", x.dtype, (rows, units, x.shape[1]), call)


def weight_grad(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ · b in fp32, (P, Q), for a (N, P) and b (N, Q): the rows in slices, the slices added in their order."""
    rows, p, q = a.shape[0], a.shape[1], b.shape[1]

    def call(choice: Choice) -> Tensor:
        if choice.by == "library":
            if a.dtype == torch.float32:
                return torch.mm(a.t(), b)
            # Rounded to half once a chunk, sums over chunks would lose what one product over all rows keeps.
            return torch.mm(a.t(), b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float().t(), b.float())
        blocks = triton.cdiv(p, choice.block_n) * triton.cdiv(q, choice.block_m)
        slices = _slices(a.device, blocks, triton.cdiv(rows, choice.block_k))
        sums = torch.empty(slices, p, q, dtype=torch.float32, device=a.device)
        depth = triton.cdiv(triton.cdiv(rows, slices), choice.block_k) * choice.block_k
        weight_grad_kernel[(blocks, slices)](
            a_ptr=a, b_ptr=b, out_ptr=sums,
            N=rows, P=p, Q=q, ROWS=depth,
            stride_an=a.stride(0), stride_bn=b.stride(0),
            PRECISION=_precision(),
            BLOCK_N=choice.block_n, BLOCK_M=choice.block_m, BLOCK_K=choice.block_k, GROUP=_GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return sums.sum(dim=0)

    return tuner(a.device).run("weight_grad", a.dtype, (rows, p, q), call)


def _slices(device: torch.device, blocks: int, most: int) -> int:
    """Slices of the rows that give every multiprocessor two programs, without one having nothing to do."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(most, triton.cdiv(2 * processors, blocks)))
