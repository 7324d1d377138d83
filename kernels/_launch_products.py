"""The kernels of `_products` as functions on tensors: grids, strides, descriptors, and cuBLAS where it wins.

All tensors are of one device. Rows lie in one piece each (`rows_together`). Nothing here allocates more than it
returns, but for the slices of a weight gradient. Every reduction is in a fixed order: the same inputs give the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._candidates import PROCESSORS, Choice, slices_of
from ._products import hidden_backward_kernel, linear_kernel, weight_grad_kernel
from ._rows import activate_kernel
from ._tuning import tuner

__all__ = [
    "Bias",
    "activation_kind",
    "describable",
    "hidden_backward",
    "image_bias",
    "linear",
    "takes_action",
    "weight_grad_slices",
]

# Programs that run side by side share this many rows of blocks in L2 (Triton's matrix-product tutorial, 6 to 8).
_GROUP = 8
# The depth of the multiply that adds an action: one instruction of the tensor cores.
_BLOCK_A = 16
_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Bias:
    """What is added to a row beside the multiply: `row` (M,) of any floating type or, with image, fp32 (images, M).

    image: int32 (N,), each row's image. action (images, A) and w_action (M, A): their product is added too.
    """

    row: Tensor
    image: Tensor | None = None
    action: Tensor | None = None
    w_action: Tensor | None = None

    @property
    def kind(self) -> str:
        """For the tuner's key."""
        if self.action is not None:
            return "action"
        return "row" if self.image is None else "image"

    def rows(self, part: slice) -> Bias:
        """The same for some of the rows."""
        return Bias(self.row, None if self.image is None else self.image[part], self.action, self.w_action)


def takes_action(action: Tensor) -> bool:
    """Whether the kernels multiply the action themselves: at most 16 components, in half precision."""
    return action.shape[1] <= _BLOCK_A and action.element_size() == 2


def activation_kind(activation: str | None, dtype: torch.dtype) -> str:
    """The kernels' name for an activation whose results are of a type: one that loses nothing there."""
    if activation is None:
        return "none"
    if activation == "gelu":
        return "erf" if dtype == torch.float32 else "rational"
    return "tanh_approx" if dtype == torch.bfloat16 else "tanh"


def precision() -> str:
    """How fp32 operands are multiplied: what torch.set_float32_matmul_precision says."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@cache
def _processors(device: torch.device) -> int:
    """SMs; without memory, where launches are recorded, an H100's or H200's, and few in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS["sm_90"] if device.type == "meta" else 2


def describable(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can point at all of the matrices: rows apart, each start at a multiple of 16 bytes."""
    return all(
        t is None
        or (
            t.stride(-1) == 1
            and t.stride(0) >= t.shape[1]
            and t.stride(0) * t.element_size() % 16 == 0
            and t.data_ptr() % 16 == 0
        )
        for t in tensors
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns])


def _layout(*tensors: Tensor | None) -> str:
    return "tma" if describable(*tensors) else "any"


def _grid(device: torch.device, tiles: int, *, persistent: bool) -> int:
    return min(tiles, _processors(device)) if persistent else tiles


def linear(
    x: Tensor, w: Tensor, bias: Bias | None, out: Tensor, *, residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """Write out (N, M) = [residual +] act( x · wᵀ + bias ) and return it; x (N, K), w (M, K) of any strides."""
    along = w.stride(1) == 1
    stored = w if along else w.t()  # as its rows lie in memory
    product = "hidden" if activation is not None else "plain" if bias is None and residual is None else "project"
    layout = _layout(x, stored, residual, out)

    def call(choice: Choice) -> Tensor:
        if choice.by == "library":
            return _library_linear(x, w, bias, out, residual, activation)
        tma = choice.by == "tma"
        rows, columns = out.shape
        n, m, k = choice.block_n, choice.block_m, choice.block_k
        tiles = triton.cdiv(rows, n) * triton.cdiv(columns, m)
        programs = _grid(x.device, tiles, persistent=tma)
        piece = m // choice.pieces
        action = None if bias is None else bias.action
        linear_kernel[(programs,)](
            x=_descriptor(x, n, k) if tma else x,
            w=(_descriptor(stored, m, k) if along else _descriptor(stored, k, m)) if tma else w,
            bias_ptr=None if bias is None else bias.row,
            action_ptr=action, w_action_ptr=None if bias is None else bias.w_action,
            image_ptr=None if bias is None else bias.image,
            residual=_descriptor(residual, n, piece) if tma and residual is not None else residual,
            out=_descriptor(out, n, piece) if tma else out,
            N=rows, M=columns, K=x.shape[1], A=0 if action is None else action.shape[1], PROGRAMS=programs,
            stride_xn=x.stride(0), stride_wm=w.stride(0), stride_wk=w.stride(1), stride_bi=columns,
            stride_ai=0 if action is None else action.stride(0),
            stride_wam=0 if bias is None or bias.w_action is None else bias.w_action.stride(0),
            stride_rn=0 if residual is None else residual.stride(0), stride_on=out.stride(0),
            TMA=tma, PERSISTENT=tma, ALONG_K=along, EVEN_K=x.shape[1] % k == 0,
            HAS_BIAS=bias is not None, PER_IMAGE=bias is not None and bias.kind == "image",
            HAS_ACTION=action is not None, HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation_kind(activation, out.dtype), DTYPE=_TRITON[out.dtype], PRECISION=precision(),
            PIECES=choice.pieces,
            BLOCK_N=n, BLOCK_M=m, BLOCK_K=k, BLOCK_A=_BLOCK_A, GROUP=_GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return out

    about = f"{layout} {bias.kind if bias else 'plain'}{' residual' if residual is not None else ''}"
    return tuner(x.device).run(product, x.dtype, (*out.shape, x.shape[1]), call, about)


def _library_linear(
    x: Tensor, w: Tensor, bias: Bias | None, out: Tensor, residual: Tensor | None, activation: str | None
) -> Tensor:
    if activation is not None and bias is not None:
        torch.mm(x, w.t(), out=out)
        _activate(out, None, bias, activation)
    elif out.dtype != x.dtype:
        out.copy_(torch.mm(x, w.t(), out_dtype=out.dtype) if x.is_cuda else torch.mm(x.float(), w.float().t()))
    elif residual is not None:
        torch.addmm(residual, x, w.t(), out=out)
        if bias is not None:
            out += bias.row
    elif bias is not None:
        torch.addmm(bias.row, x, w.t(), out=out)
    else:
        torch.mm(x, w.t(), out=out)
    return out


def _activate(u: Tensor, d: Tensor | None, bias: Bias, activation: str) -> None:
    """Turn u (N, M) into act(u + bias), and d (N, M) into the gradient through it, in place."""
    assert d is None or d.stride() == u.stride()
    bias = _without_action(bias)
    rows, columns = u.shape
    activate_kernel[(triton.cdiv(rows, 16), triton.cdiv(columns, 128))](
        u_ptr=u, d_ptr=d, bias_ptr=bias.row, image_ptr=bias.image,
        N=rows, M=columns,
        stride_un=u.stride(0), stride_bi=columns,
        PER_IMAGE=bias.kind == "image", HAS_GRADIENT=d is not None, ACTIVATION=activation_kind(activation, u.dtype),
        BLOCK_N=16, BLOCK_M=128, num_warps=4,
    )  # fmt: skip


def _without_action(bias: Bias) -> Bias:
    """The same bias with the action's part in it, fp32 (images, M)."""
    if bias.action is None or bias.w_action is None:
        return bias
    return Bias(image_bias(bias.row, bias.action, bias.w_action), bias.image)


def image_bias(b_in: Tensor, action: Tensor, w_action: Tensor) -> Tensor:
    """b_in + action · w_actionᵀ, fp32 (images, M)."""
    return torch.addmm(b_in.float(), action.float(), w_action.float().t())


def hidden_backward(
    x: Tensor, w_in: Tensor, bias: Bias, dout: Tensor, w_out: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """act(u) and (dout · w_out) ∘ act'(u), of u = x · w_inᵀ + bias, both (N, H) of x's type.

    x (N, D), w_in (H, D), dout (N, Do), w_out (Do, H).
    """
    rows, units = x.shape[0], w_in.shape[0]
    hidden, dhidden = (torch.empty(rows, units, dtype=x.dtype, device=x.device) for _ in range(2))
    layout = _layout(x, w_in, dout, w_out, hidden, dhidden)

    def call(choice: Choice) -> tuple[Tensor, Tensor]:
        if choice.by == "library":
            torch.mm(x, w_in.t(), out=hidden)
            torch.mm(dout, w_out, out=dhidden)
            _activate(hidden, dhidden, bias, activation)
            return hidden, dhidden
        tma = choice.by == "tma"
        n, m, k = choice.block_n, choice.block_m, choice.block_k
        programs = _grid(x.device, triton.cdiv(rows, n) * triton.cdiv(units, m), persistent=tma)
        even, piece = x.shape[1] % k == 0 and dout.shape[1] % k == 0, m // choice.pieces
        hidden_backward_kernel[(programs,)](
            x=_descriptor(x, n, k) if tma else x, w_in=_descriptor(w_in, m, k) if tma else w_in,
            bias_ptr=bias.row, action_ptr=bias.action, w_action_ptr=bias.w_action, image_ptr=bias.image,
            dout=_descriptor(dout, n, k) if tma else dout, w_out=_descriptor(w_out, k, m) if tma else w_out,
            hidden=_descriptor(hidden, n, piece) if tma else hidden,
            dhidden=_descriptor(dhidden, n, piece) if tma else dhidden,
            N=rows, H=units, D=x.shape[1], DO=dout.shape[1],
            A=0 if bias.action is None else bias.action.shape[1], PROGRAMS=programs,
            stride_xn=x.stride(0), stride_wih=w_in.stride(0), stride_wid=w_in.stride(1), stride_bi=units,
            stride_ai=0 if bias.action is None else bias.action.stride(0),
            stride_wah=0 if bias.w_action is None else bias.w_action.stride(0),
            stride_dn=dout.stride(0), stride_woh=w_out.stride(1), stride_woo=w_out.stride(0), stride_hn=units,
            TMA=tma, PERSISTENT=tma, EVEN_K=even,
            PER_IMAGE=bias.kind == "image", HAS_ACTION=bias.action is not None,
            ACTIVATION=activation_kind(activation, x.dtype), DTYPE=_TRITON[x.dtype], PRECISION=precision(),
            PIECES=choice.pieces,
            BLOCK_N=n, BLOCK_M=m, BLOCK_K=k, BLOCK_A=_BLOCK_A, GROUP=_GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return hidden, dhidden

    about = f"{layout} {bias.kind}"
    return tuner(x.device).run("hidden_backward", x.dtype, (rows, units, x.shape[1]), call, about)


def weight_grad_slices(a: Tensor, b: Tensor, *, bias: bool = False) -> Tensor:
    """Parts of aᵀ · b, fp32 (S, P · Q), to be added by `add_gradients`, for a (N, P) and b (N, Q): a slice each.

    bias: parts of the sums of a's columns too, behind the others: (S, P · Q + P). Of operands in half precision.
    """
    rows, p, q = a.shape[0], a.shape[1], b.shape[1]
    length = p * q + (p if bias else 0)

    def call(choice: Choice) -> Tensor:
        if choice.by == "library":
            whole = torch.empty(1, length, dtype=torch.float32, device=a.device)
            _library_weight_grad(a, b, whole[0, : p * q].view(p, q))
            if bias:
                torch.sum(a, 0, dtype=torch.float32, out=whole[0, p * q :])
            return whole
        tma = choice.by == "tma"
        n, m, k = choice.block_n, choice.block_m, choice.block_k
        blocks = triton.cdiv(p, n) * triton.cdiv(q, m)
        slices = slices_of(blocks, triton.cdiv(rows, k), _processors(a.device))
        sums = torch.empty(slices, length, dtype=torch.float32, device=a.device)
        depth = triton.cdiv(triton.cdiv(rows, slices), k) * k
        weight_grad_kernel[(blocks, slices)](
            a=_descriptor(a, k, n) if tma else a, b=_descriptor(b, k, m) if tma else b, out_ptr=sums,
            N=rows, P=p, Q=q, ROWS=depth,
            stride_an=a.stride(0), stride_bn=b.stride(0), stride_os=length,
            TMA=tma, HAS_BIAS=bias, PRECISION=precision(),
            BLOCK_N=n, BLOCK_M=m, BLOCK_K=k, GROUP=_GROUP,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        return sums

    about = f"{_layout(a, b)}{' bias' if bias else ''}"
    return tuner(a.device).run("weight_grad", a.dtype, (rows, p, q), call, about)


def _library_weight_grad(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a.t(), b, out=out)
    elif a.is_cuda:
        torch.mm(a.t(), b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float().t(), b.float(), out=out)
