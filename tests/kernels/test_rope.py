"""Rotations of queries and keys against each pair turned by its angle, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.kernels import rope, rope_bytes, rope_flops, rope_reference, rotate_qk, use_backend
from iwm_fast.models.positions import rotation_table


def sampled(tokens: int, heads: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 3, heads, width, generator=generator, dtype=torch.float64)


def turned(patches: int, width: int, seed: int = 0) -> Tensor:
    """A table of random angles, none like another."""
    generator = torch.Generator().manual_seed(seed)
    angles = 6 * torch.rand(patches, width // 2, generator=generator, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def places(tokens: int, patches: int, seed: int = 0) -> Tensor:
    """−1, a token without a position, among them."""
    return torch.randint(-1, patches, (tokens,), generator=torch.Generator().manual_seed(seed))


def exact(qkv: Tensor, table: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token and one pair at a time, as complex numbers."""
    half = table.shape[1] // 2
    out = [part.clone() for part in qkv.unbind(1)]
    for n, patch in enumerate(patches.tolist()):
        for i in range(half if patch >= 0 else 0):
            angle = torch.complex(table[patch, i], table[patch, half + i])
            for part, source in ((out[0], qkv[:, 0]), (out[1], qkv[:, 1])):
                z = torch.complex(source[n, :, i], source[n, :, half + i]) * angle
                part[n, :, i], part[n, :, half + i] = z.real, z.imag
    return out[0], out[1], out[2]


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 12), heads=st.integers(1, 3), half=st.integers(1, 5), patches=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_value_gradient_and_inverse(tokens: int, heads: int, half: int, patches: int, seed: int) -> None:
    table, which = turned(patches, 2 * half, seed), places(tokens, patches, seed)
    leaf = sampled(tokens, heads, 2 * half, seed).requires_grad_()
    incoming = sampled(tokens, heads, 2 * half, seed + 1).unbind(1)
    expected = exact(leaf, table, which)
    (wanted,) = torch.autograd.grad(expected, leaf, incoming)
    for call in (rope, rope_reference):
        qkv = leaf.clone()
        found = call(qkv, table, which)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        (grad,) = torch.autograd.grad(found, leaf, incoming)
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)
    given = leaf.detach().clone()
    rotate_qk(given, table, which)
    torch.testing.assert_close(given, torch.stack(expected, 1), rtol=0, atol=1e-12)
    rotate_qk(given, table, which, inverse=True)
    torch.testing.assert_close(given, leaf.detach(), rtol=0, atol=1e-12)


def test_the_gradient_matches_finite_differences() -> None:
    table, which = turned(3, 4), torch.tensor([2, -1, 0, 1])
    torch.autograd.gradcheck(lambda x: rope(x.clone(), table, which), sampled(4, 2, 4).requires_grad_())


def test_it_writes_q_and_k_in_place_and_no_token_without_a_position() -> None:
    qkv, table = sampled(5, 2, 4), turned(3, 4)
    before = qkv.clone()
    q, k, v = rope(qkv, table, torch.tensor([0, -1, 2, 1, -1]))
    assert [part.data_ptr() for part in (q, k, v)] == [part.data_ptr() for part in qkv.unbind(1)]
    assert torch.equal(v, before[:, 2])
    assert torch.equal(qkv[[1, 4]], before[[1, 4]])
    assert not torch.isclose(qkv[[0, 2, 3], :2], before[[0, 2, 3], :2]).any()


def test_a_node_that_saved_qkv_reports_that_it_was_overwritten() -> None:
    x = sampled(3, 1, 4).requires_grad_()
    qkv = x.exp()  # saves its result
    q, *_ = rope(qkv, turned(2, 4), torch.tensor([0, 1, 0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


def test_many_tokens_are_rotated_in_pieces_alike() -> None:
    """More than a piece of the CPU's."""
    qkv, table, which = sampled(700, 6, 64).float(), turned(9, 64).float(), places(700, 9)
    expected = torch.stack(rope_reference(qkv, table, which), 1)
    torch.testing.assert_close(torch.stack(rope(qkv, table, which), 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    qkv, table, which = sampled(9, 2, 8).to(dtype), turned(4, 8).float(), places(9, 4)
    expected = torch.stack(exact(qkv.double(), table.double(), which), 1)
    found = torch.stack(rope(qkv, table, which), 1)
    assert found.dtype == dtype
    # Half a unit in the last place, and an fp32 error on top.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [lambda g: g, lambda g: g.transpose(0, 1).contiguous().transpose(0, 1)])
def test_gradients_of_any_strides(layout) -> None:
    table, which = turned(3, 4), places(6, 3)
    leaf, upstream = sampled(6, 2, 4).requires_grad_(), sampled(6, 2, 4, 1).unbind(1)
    (found,) = torch.autograd.grad(rope(leaf.clone(), table, which), leaf, [layout(part) for part in upstream])
    (wanted,) = torch.autograd.grad(rope_reference(leaf, table, which), leaf, upstream)
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow  # the import of torch's compiler
def test_compiled_it_computes_the_same_in_one_graph() -> None:
    table, which = turned(3, 4), places(6, 3)
    leaf, upstream = sampled(6, 2, 4).requires_grad_(), sampled(6, 2, 4, 1).unbind(1)
    compiled = torch.compile(rope, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(leaf, table, which), rope_reference(leaf, table, which), strict=True):
        torch.testing.assert_close(a, b)
    (found,) = torch.autograd.grad(compiled(leaf, table, which), leaf, upstream)
    (wanted,) = torch.autograd.grad(rope_reference(leaf, table, which), leaf, upstream)
    torch.testing.assert_close(found, wanted)


def test_counted_flops_and_bytes() -> None:
    assert rope_flops(100, 64) == rope_flops(100, 64, backward=True) == 100 * 2 * 64 * 3
    assert rope_bytes(100, 64) == rope_bytes(100, 64, backward=True) == 100 * (4 * 64 * 2 + 8)
    assert rope_bytes(100, 64, backward=True, packed=False) == 100 * (6 * 64 * 2 + 8)
    given = torch.empty(10, 3, 2, 8, device="meta"), torch.empty(4, 8, device="meta"), torch.empty(10, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.ops.iwm_fast.rope_(*given, False)
        torch.ops.iwm_fast.rope_backward(given[0][:, 0], given[0][:, 1], given[0][:, 2], *given[1:])
    assert counter.get_total_flops() == rope_flops(10, 16) + rope_flops(10, 16, backward=True)


@pytest.mark.parametrize("base", [100.0, 10.0])
def test_the_table_is_that_of_the_angles(plain, base: float) -> None:
    table = rotation_table(3, 8, base, torch.device("cpu"), torch.float64)
    for patch in range(9):
        angles = plain.rope_angles(patch, 3, 8, base)
        expected = [f(angle) for f in (math.cos, math.sin) for angle in angles]
        torch.testing.assert_close(table[patch], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"qkv": torch.zeros(3, 3, 4)}, "qkv has shape"),
        ({"qkv": torch.zeros(3, 2, 1, 4)}, "qkv has shape"),
        ({"qkv": torch.zeros(3, 3, 1, 5)}, "qkv has shape"),
        ({"qkv": torch.zeros(3, 3, 1, 4, dtype=torch.int64)}, "qkv is torch.int64"),
        ({"qkv": torch.zeros(3, 3, 4, 2).transpose(2, 3)}, "qkv has strides"),
        ({"qkv": torch.zeros(1, 3, 1, 4).expand(3, 3, 1, 4)}, "qkv has strides"),
        ({"table": torch.zeros(2, 3)}, "table has shape"),
        ({"table": torch.zeros(2, 4, dtype=torch.bfloat16)}, "table is torch.bfloat16"),
        ({"table": torch.zeros(4, 2).T}, "table has strides"),
        ({"patches": torch.tensor([0, 1])}, "patches has shape"),
        ({"patches": torch.tensor([0, 1, 2])}, "patches spans 0 to 2; table has rows 0 to 1"),
        ({"patches": torch.tensor([0, 1, -2])}, "patches spans -2 to 1"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, object], begins: str) -> None:
    given = {"qkv": torch.zeros(3, 3, 1, 4), "table": torch.zeros(2, 4), "patches": torch.tensor([0, 1, 0])} | changes
    with pytest.raises(ValueError, match=begins):
        rope(given.pop("qkv"), given.pop("table"), given.pop("patches"), **given)  # type: ignore[arg-type]


def test_under_autocast_it_computes_as_without() -> None:
    qkv, table, which = sampled(5, 2, 4).float(), turned(3, 4).float(), places(5, 3)
    expected = rope(qkv.clone(), table, which)
    with torch.autocast("cpu", torch.bfloat16), use_backend("reference"):
        found = rope(qkv.clone(), table, which)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
