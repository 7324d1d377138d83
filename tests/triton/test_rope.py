"""The rotation of queries and keys on Triton against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.kernels import rope, rope_reference, rotate_qk, use_backend
from iwm_fast.models.attention import Attention
from iwm_fast.models.packing import Segments
from iwm_fast.models.positions import Rotation


def drawn(tokens, heads, width, patches, seed, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, 3, heads, width, generator=generator)
    angles = 6 * torch.rand(patches, width // 2, generator=generator)
    which = torch.randint(-1, patches, (tokens,), generator=generator)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    return qkv.to(device, dtype), table.to(device), which.to(device)


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 7, 33, 70]), heads=st.sampled_from([1, 3]), half=st.sampled_from([1, 2, 20, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), packed=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_value_and_gradient(tokens, heads, half, dtype, packed, seed, device):
    """packed: gradients that are views of one tensor, as one attention gives them, else three tensors."""
    qkv, table, which = drawn(tokens, heads, 2 * half, 5, seed, device, dtype)
    leaf = qkv.clone().requires_grad_()
    exact = qkv.double().cpu().requires_grad_()
    found = rope(leaf.clone(), table, which, backend="triton")
    expected = rope_reference(exact, table.double().cpu(), which.cpu())
    bound = {"rtol": torch.finfo(dtype).eps / 2 + 1e-6, "atol": 2e-6}
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double().cpu(), b, **bound)
    whole = drawn(tokens, heads, 2 * half, 5, seed + 1, device, dtype)[0]
    upstream = whole.unbind(1) if packed else [part.clone() for part in whole.unbind(1)]
    (grad,) = torch.autograd.grad(found, leaf, upstream)
    (wanted,) = torch.autograd.grad(expected, exact, whole.double().cpu().unbind(1))
    torch.testing.assert_close(grad.double().cpu(), wanted, **bound)


def test_in_place_and_back_leaves_v_and_prefix_tokens_untouched(device):
    qkv, table, which = drawn(40, 2, 12, 5, 0, device)
    before = qkv.clone()
    rotate_qk(qkv, table, which, backend="triton")
    assert torch.equal(qkv[:, 2], before[:, 2])
    assert torch.equal(qkv[which < 0], before[which < 0])
    rotate_qk(qkv, table, which, inverse=True, backend="triton")
    torch.testing.assert_close(qkv, before)


def test_a_patch_out_of_range_counts_as_nan(device):
    qkv, table, _ = drawn(3, 1, 4, 5, 0, device)
    before = qkv.clone()
    torch.ops.iwm_fast.rope_(qkv, table, torch.tensor([4, 5, 99], device=device), False)
    assert qkv[0].isfinite().all()
    assert qkv[1:, :2].isnan().all()
    assert torch.equal(qkv[:, 2], before[:, 2])


def test_rows_of_a_wider_tensor_and_gradients_of_any_strides(device):
    qkv, table, which = drawn(9, 2, 6, 5, 0, device)
    wide = torch.full((9, 3, 4, 6), float("nan"), device=device)
    rows = torch.as_strided(wide, (9, 3, 2, 6), (72, 12, 6, 1))
    rows.copy_(qkv)
    rotate_qk(rows, table, which, backend="triton")
    rotate_qk(qkv, table, which, backend="triton")
    assert torch.equal(rows, qkv)
    assert torch.as_strided(wide, (9, 36), (72, 1), 36).isnan().all()
    upstream = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in qkv.unbind(1)]
    found = torch.ops.iwm_fast.rope_backward(*upstream, table, which)
    assert torch.equal(found, torch.ops.iwm_fast.rope_backward(*qkv.unbind(1), table, which))


def test_opcheck(device):
    qkv, table, which = drawn(9, 2, 6, 5, 0, device)
    torch.library.opcheck(torch.ops.iwm_fast.rope_.default, (qkv.clone(), table, which, False))
    torch.library.opcheck(torch.ops.iwm_fast.rope_backward.default, (*qkv.clone().unbind(1), table, which))


@pytest.mark.parametrize("images", [[5, 4], [3, 0, 6]], ids=str)
def test_attention_with_a_rotation(images, device):
    segments = Segments.from_lengths(images, device)
    qkv, table, which = drawn(9, 2, 12, 5, 0, device)
    attention = Attention(24, 2, "sdpa").to(device)
    found = []
    for backend in ("triton", "reference"):
        leaf = qkv.flatten(1).clone().requires_grad_()
        with use_backend(backend):
            out = attention(leaf.clone(), segments, Rotation(table, which))
            found.append((out, *torch.autograd.grad((out**2).sum(), leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
