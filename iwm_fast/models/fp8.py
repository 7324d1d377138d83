"""Linear layers of the target encoder in fp8 while training: it has no gradient, so lower precision affects nothing
else.

Both factors are rounded to e4m3, with a power of two as scale of each row (`kernels.e4m3_rows`); sums are fp32.

On CUDA the matmul is `torch._scaled_mm`, up to twice as fast as bf16; elsewhere the same numbers are multiplied in the
tokens' type, which is slower but measures the accuracy of fp8. Unchanged: patch embedding, normalisations, attention's
softmax, the residual stream, and the weights, which are rounded in each forward pass: EMA, checkpoints and exports hold
no fp8. The MLP is no longer one operator: its hidden activations pass through memory twice, before GELU in the tokens'
type and after it in e4m3.

In evaluation mode the encoder computes in its own type: fp8 is part of training, not of the model.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast import kernels
from iwm_fast.errors import UserError
from iwm_fast.models.blocks import Block, ConditionedMlp
from iwm_fast.models.vit import VisionTransformer

__all__ = ["fp8_linear", "products_in_fp8", "require_fp8", "scaled_product"]

_CAPABILITY = (8, 9)  # Ada, then Hopper: the first GPUs with fp8
_MULTIPLE = 16  # _scaled_mm needs rows of a multiple of this many bytes


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """Return [gelu](x) · weightᵀ + bias with both factors rounded to e4m3 by row.

    A row of x with a NaN or an infinity gives NaN, as does such a row of the weight in its column of the result.

    Args:
        x: (N, K), bf16 or fp32, off CUDA float64 too; N may be 0.
        weight: (M, K) of x's type.
        bias: (M,) of x's type.
        activation: "none", or "gelu", of x before it is rounded.

    Returns:
        (N, M) of x's type; on CUDA rounded to bf16 first, the only output type of `torch._scaled_mm` with row-wise
        scales. On CUDA, a matmul with K or M no multiple of 16 runs in x's type instead.

    Raises:
        ValueError: a gradient would have to flow through it.

    """
    on_gpu = x.is_cuda or x.is_meta  # a tensor without memory counts GPU launches
    if on_gpu and (not len(x) or weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE):
        return F.linear(F.gelu(x) if activation == "gelu" else x, weight, bias)
    left, right = kernels.e4m3_rows(x, activation=activation), kernels.e4m3_rows(weight)
    if on_gpu:
        return scaled_product(left, right, bias).to(x.dtype)
    return F.linear(_numbers(*left, x.dtype), _numbers(*right, x.dtype), bias)


def scaled_product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
    """Multiply (N, K) by (M, K) transposed, codes with their scales, and add bias (M,): (N, M) in bf16."""
    (x, x_scale), (weight, weight_scale) = left, right
    # Not the fast accumulation: Hopper's keeps 14 bits of a sum, and fp32 is required.
    return torch._scaled_mm(  # noqa: SLF001  (PyTorch has no public name for it)
        x, weight.t(), x_scale, weight_scale.t(), bias=bias.to(torch.bfloat16), out_dtype=torch.bfloat16
    )


def _numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor itself, (N, K), in a type that holds it exactly."""
    # By a table: PyTorch's CPU conversion from e4m3 takes 2 to 7 times as long.
    values = _values(dtype).to(codes.device).index_select(0, codes.view(torch.uint8).flatten().int())
    return values.view_as(codes).mul_(scale.to(dtype))


@cache
def _values(dtype: torch.dtype) -> Tensor:
    """(256,): the value of each e4m3 code."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(dtype)


class Fp8Linear(nn.Linear):
    """A linear layer whose matmul is in fp8 in training mode."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Linear's name)
        """Map (N, K) to (N, M)."""
        return fp8_linear(input, self.weight, self.bias) if self.training else super().forward(input)


class Fp8Mlp(ConditionedMlp):
    """An encoder block's unconditioned MLP, with both matmuls in fp8 in training mode."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, action: Tensor | None = None) -> Tensor:
        """Map x (N, D) to (N, D)."""
        if not self.training:
            return super().forward(x, cu_seqlens, action)
        _, normed = kernels.residual_norm(x, None, self.norm_weight, self.norm_bias, eps=self.eps)
        hidden = fp8_linear(normed, self.w_in, self.b_in)
        return fp8_linear(hidden, self.w_out, self.b_out, "gelu").add_(x)


def products_in_fp8(encoder: VisionTransformer) -> None:
    """Switch the encoder's blocks to fp8 in training mode. Parameters and their names stay."""
    for block in encoder.blocks:
        assert isinstance(block, Block)
        # Change the class only: a new module would sample weights and shift the random numbers of later ones.
        block.attn.qkv.__class__ = block.attn.proj.__class__ = Fp8Linear
        block.mlp.__class__ = Fp8Mlp


def require_fp8(device: torch.device) -> None:
    """Raise UserError where `device` is a GPU that cannot multiply in fp8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"model.target_precision is fp8, which needs a GPU of capability 8.9 or later; {name} has "
            f"{capability[0]}.{capability[1]}: use train"
        )
    sample = torch.ones(_MULTIPLE, _MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        fp8_linear(sample, sample, sample[0])
    except RuntimeError as error:
        # Row-wise scales are missing on some newer GPUs (capability 12.0 with PyTorch 2.10, pytorch/pytorch#192707).
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.target_precision is fp8, which this PyTorch cannot multiply on this GPU ({reason}): use train"
        ) from error
