"""Squared ReLU, y = max(x, 0)² (So et al. 2021, arXiv:2109.08668), in one Triton kernel per direction.

Forward: x read, y written. Backward: x and dy read, dx = 2 · max(x, 0) · dy written; nothing but x is saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels._lib.backend import resolve_backend
from iwm_fast.kernels._lib.jit import to_type

BLOCK = 1024


def squared_relu_reference(x: Tensor) -> Tensor:
    """The same with PyTorch's operators, in any dtype and on any device."""
    return x.relu().square()


def squared_relu_bytes(elements: int, *, element: int = 2) -> dict[str, int]:
    """The least bytes moved: a lower bound of the time is this over the device's bandwidth."""
    return {"forward": 2 * element * elements, "backward": 3 * element * elements}


@triton.jit(do_not_specialize=["N"])
def forward_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    x = tl.maximum(tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 0.0)
    tl.store(y_ptr + offsets, to_type(x * x, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(x_ptr, dy_ptr, dx_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    x = tl.maximum(tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 0.0)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, to_type(2.0 * x * dy, dx_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("my_project::squared_relu", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK)
    return y


@torch.library.custom_op("my_project::squared_relu_backward", mutates_args=())
def _backward(x: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    if x.numel():
        backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, dy, dx, x.numel(), BLOCK)
    return dx


_forward.register_fake(torch.empty_like)  # for torch.compile
_backward.register_fake(lambda x, dy: torch.empty_like(x))
_forward.register_autograd(
    lambda ctx, dy: torch.ops.my_project.squared_relu_backward(*ctx.saved_tensors, dy.contiguous()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def squared_relu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)² of x, in its dtype. backend: "triton", "reference", or "auto": Triton where x is on a GPU."""
    if resolve_backend(backend, "x", x) == "reference":
        return squared_relu_reference(x)
    return torch.ops.my_project.squared_relu(x.contiguous())
