"""The sums of SIGReg on Triton against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.kernels import sigreg_sums


def projections(rows, directions, seed, device, size=1.0):
    return (size * torch.randn(rows, directions, generator=torch.Generator().manual_seed(seed))).to(device)


def exact(p, spacing, knots, rows):
    angles = spacing * torch.arange(1, knots + 1, dtype=torch.float64)[:, None, None] * p[:rows]
    return torch.stack((angles.cos().sum(1), angles.sin().sum(1)))


@settings(max_examples=12)
@given(
    rows=st.integers(0, 37), padding=st.sampled_from([0, 3]), directions=st.sampled_from([1, 7, 128, 131]),
    knots=st.sampled_from([1, 8, 16]), size=st.sampled_from([0.1, 1.0, 20.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_value_and_gradient(rows, padding, directions, knots, size, seed, device):
    ours = projections(rows + padding, directions, seed, device, size).requires_grad_()
    theirs = ours.detach().double().cpu().requires_grad_()
    count = torch.tensor([rows], device=device) if padding else None
    incoming = projections(2 * knots, directions, seed + 1, device).view(2, knots, directions)
    found = sigreg_sums(ours, spacing=0.375, knots=knots, rows=count, backend="triton")
    expected = exact(theirs, 0.375, knots, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=1e-5 * max(rows, 1) * max(size, 1))
    found.backward(incoming)
    expected.backward(incoming.double().cpu())
    # The error of each of the 2 · knots terms is that of its sine, whose angle is rounded to fp32 first.
    bound = 1e-6 * knots**2 * max(size, 1) + 1e-6
    torch.testing.assert_close(ours.grad.double().cpu(), theirs.grad, rtol=0, atol=3 * bound)


@pytest.mark.parametrize("rows", [1, 900])
def test_sums_are_the_same_bits_each_time(rows, device):
    p = projections(rows, 5, 0, device)
    first = sigreg_sums(p, spacing=0.375, knots=8, backend="triton")
    assert torch.equal(first, sigreg_sums(p.clone(), spacing=0.375, knots=8, backend="triton"))


def test_column_major_projections_are_accepted(device):
    p = projections(7, 5, 0, device)
    transposed = p.T.contiguous().T
    same = [sigreg_sums(x, spacing=0.375, knots=3, backend="triton") for x in (p, transposed)]
    assert torch.equal(*same)
