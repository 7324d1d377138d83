"""Packed attention is each image's own attention."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.errors import UserError
from iwm_fast.models import attention
from iwm_fast.models.attention import packed_attention, packed_qkv_attention, resolve_backend
from iwm_fast.models.packing import Segments


def draw_qkv(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three views of one (N, 3, 2, 5) tensor, as the model has them."""
    torch.manual_seed(tokens)
    return list(torch.randn(tokens, 3, 2, 5, dtype=dtype).requires_grad_().unbind(1))


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=7))
@settings(deadline=None, max_examples=40)
def test_equals_each_image_for_itself(plain: SimpleNamespace, lengths: list[int]) -> None:
    q, k, v = draw_qkv(sum(lengths))
    ours = packed_attention(q, k, v, Segments.from_lengths(lengths), "sdpa")
    assert ours.shape == q.shape
    images = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
    theirs = torch.cat([plain.attention(*image) for image in images if len(image[0])] or [v])
    torch.testing.assert_close(ours, theirs)
    if sum(lengths):
        weight = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad((ours * weight).sum(), (q, k, v), retain_graph=True),
            torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lengths", [[3, 1, 6, 3], [4, 4, 4], [5, 0, 2]], ids=["ragged", "equal", "with an empty one"])
def test_equals_sdpa_with_the_mask_that_xformers_would_use(lengths: list[int]) -> None:
    pytest.importorskip("xformers.ops")
    q, k, v = (part.detach() for part in draw_qkv(sum(lengths)))
    segments = Segments.from_lengths(lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = segments.block_diagonal_mask.materialize((sum(lengths), sum(lengths)), dtype=torch.float64)
    heads_first = (part.transpose(0, 1) for part in (q, k, v))
    dense = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(packed_attention(q, k, v, segments, "sdpa"), dense)


def test_xformers_gets_one_packed_row_and_the_mask_of_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xformers.ops")
    seen = {}

    def operator(q: Tensor, k: Tensor, v: Tensor, attn_bias: object) -> Tensor:
        seen.update(shape=q.shape, bias=attn_bias)
        return v

    monkeypatch.setattr(attention, "_xformers", lambda: SimpleNamespace(memory_efficient_attention=operator))
    segments = Segments.from_lengths([2, 0, 3])
    q, k, v = draw_qkv(5)
    assert packed_attention(q, k, v, segments, "xformers").shape == v.shape
    assert seen["shape"] == (1, 5, 2, 5)
    assert seen["bias"] is segments.block_diagonal_mask
    assert seen["bias"].q_seqinfo.seqstart_py == [0, 2, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    """On the CPU the products and the softmax are fp32, so the result is the exact one of the inputs as they are."""
    q, k, v = (part.detach() for part in draw_qkv(9, dtype))
    segments = Segments.from_lengths([4, 5])
    exact = packed_attention(q.double(), k.double(), v.double(), segments, "sdpa")
    torch.testing.assert_close(packed_attention(q, k, v, segments, "sdpa"), exact.to(dtype), rtol=0, atol=2e-7)


def test_segments_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="segments have 4 tokens"):
        packed_attention(*draw_qkv(5), Segments.from_lengths([2, 2]), "sdpa")


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'flash'"):
        packed_attention(*draw_qkv(5), Segments.from_lengths([5]), "flash")
    with pytest.raises(ValueError, match="requested is 'flash'"):
        resolve_backend("flash", "cpu")


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = resolve_backend.__wrapped__
    monkeypatch.setattr(attention, "_xformers", object)
    assert resolve("auto", "cpu") == "sdpa"
    assert resolve("auto", "cuda") == "xformers"
    assert resolve("sdpa", "cuda") == "sdpa"
    assert resolve("efficient", "cuda") == "efficient"
    for requested in ("xformers", "efficient"):
        with pytest.raises(UserError, match=f"{requested}, which has no operator for cpu"):
            resolve(requested, "cpu")
    monkeypatch.setattr(attention, "_xformers", lambda: None)
    assert resolve("auto", "cuda") == "efficient"  # grouped SDPA would be a call for each length
    with pytest.raises(UserError, match="not installed"):
        resolve("xformers", "cuda")


class Packed:
    """PyTorch's memory-efficient attention on the CPU, where it has no kernel: `Attend` and its gradients, as given."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = [n for n in lengths if n]
        self.gradients: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        bias, first, *sizes = rest
        longest = max(self.lengths)
        assert first.tolist() == [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        assert bias is None
        assert sizes[1:5] == [longest, longest, 0.0, 0]
        out = packed_attention(q[0], k[0], v[0], Segments.from_lengths(self.lengths), "sdpa")
        return (out[None], *torch.zeros(3, 1), torch.zeros(1), torch.zeros(1))

    def backward(self, grad: Tensor, *given: Any, shared_storage_dqdkdv: bool) -> tuple[Tensor, ...]:
        assert shared_storage_dqdkdv
        leaves = [part[0].detach().requires_grad_() for part in given[:3]]
        with torch.enable_grad():
            out = packed_attention(*leaves, Segments.from_lengths(self.lengths), "sdpa")
        found = torch.autograd.grad(out, leaves, grad[0])
        self.gradients = torch.empty(1, len(grad[0]), 3, *grad.shape[2:], dtype=grad.dtype)
        for place, part in enumerate(found):
            self.gradients[:, :, place] = part
        return (*self.gradients.unbind(2), torch.empty(0))


@pytest.mark.parametrize("lengths", [[3, 1, 6, 3], [4, 4, 4], [5, 0, 2]], ids=["ragged", "equal", "with an empty one"])
@pytest.mark.parametrize(("backend", "dtype"), [("efficient", torch.float64), ("xformers", torch.float32)], ids=str)
def test_the_gradients_of_queries_keys_and_values_are_one_tensor_that_nobody_copied(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], backend: str, dtype: torch.dtype
) -> None:
    operators = Packed(lengths)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", operators.forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", operators.backward)
    segments = Segments.from_lengths(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 5, dtype=dtype, requires_grad=True)
    out = packed_qkv_attention(qkv, segments, backend)
    plain = packed_qkv_attention(qkv, segments, "sdpa")
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    upstream = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(plain, qkv, upstream)
    (found,) = torch.autograd.grad(out, qkv, upstream)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert operators.gradients is not None
    assert found.data_ptr() == operators.gradients.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(packed_qkv_attention(qkv, segments, backend), plain, rtol=0, atol=0)


def test_a_packed_tensor_of_another_batch_is_refused() -> None:
    qkv = torch.randn(5, 3, 2, 5, requires_grad=True)
    for backend in ("efficient", "xformers", "sdpa"):
        with pytest.raises(ValueError, match="segments have 4 tokens"):
            packed_qkv_attention(qkv, Segments.from_lengths([2, 2]), backend)
