"""SIGReg's sums against every sine and cosine computed in float64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.kernels import sigreg, sigreg_sums, sigreg_sums_bytes, sigreg_sums_flops


def sampled(rows: int, directions: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(rows, directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(p: Tensor, spacing: float, knots: int, rows: int) -> Tensor:
    """Compute every sine and cosine directly."""
    t = spacing * torch.arange(1, knots + 1, dtype=p.dtype)
    angles = t[:, None, None] * p[:rows]
    return torch.stack((angles.cos().sum(1), angles.sin().sum(1)))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40), directions=st.integers(1, 9), knots=st.integers(1, 17), padding=st.integers(0, 5),
    spacing=st.sampled_from([0.1, 0.375, 3.0]), size=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 99),
    in_cache=st.sampled_from([1, 20, 100, sigreg._IN_CACHE]),
)  # fmt: skip
def test_value_and_gradient(
    rows: int, directions: int, knots: int, padding: int, spacing: float, size: float, seed: int, in_cache: int
) -> None:
    with patch.object(sigreg, "_IN_CACHE", in_cache):
        check_value_and_gradient(rows, directions, knots, padding, spacing, size, seed)


def check_value_and_gradient(
    rows: int, directions: int, knots: int, padding: int, spacing: float, size: float, seed: int
) -> None:
    ours = sampled(rows + padding, directions, seed, size).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    count = torch.tensor([rows]) if padding else None
    incoming = sampled(2 * knots, directions, seed + 1).view(2, knots, directions)
    found, expected = (
        sigreg_sums(ours, spacing=spacing, knots=knots, rows=count),
        reference(theirs, spacing, knots, rows),
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.backward(incoming)
    expected.backward(incoming)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_the_gradient_matches_finite_differences() -> None:
    p = sampled(5, 3, 0).requires_grad_()
    torch.autograd.gradcheck(lambda x: sigreg_sums(x, spacing=0.375, knots=4, rows=torch.tensor([4])), p)


def test_fp32_error_is_below_1e_5_of_the_largest_sum() -> None:
    p = sampled(1024, 16, 0)
    found = sigreg_sums(p.float(), spacing=0.375, knots=8).double()
    expected = reference(p.float().double(), 0.375, 8, 1024)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_counted_flops_and_bytes() -> None:
    assert sigreg_sums_bytes(100, 32, 8) == 4 * (100 * 32 + 2 * 8 * 32)
    assert sigreg_sums_bytes(100, 32, 8, backward=True) == 4 * (2 * 100 * 32 + 2 * 8 * 32)
    assert sigreg_sums_flops(100, 32, 8) == 100 * 32 * (2 + 8 * 8)


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"p": torch.zeros(3)}, "p has shape"),
        ({"p": torch.zeros(3, 2, dtype=torch.bfloat16)}, "p is torch.bfloat16; it must be torch.float32"),
        ({"spacing": 0.0}, "spacing is 0.0"),
        ({"knots": 0}, "knots is 0"),
        ({"rows": torch.tensor([1, 2])}, "rows has shape"),
        ({"rows": torch.tensor([1.0])}, "rows is torch.float32"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, object], begins: str) -> None:
    given = {"p": torch.zeros(3, 2), "spacing": 0.375, "knots": 2} | changes
    with pytest.raises(ValueError, match=begins):
        sigreg_sums(given.pop("p"), **given)  # type: ignore[arg-type]
