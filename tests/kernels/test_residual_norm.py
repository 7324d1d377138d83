"""residual_norm against a float64 evaluation row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.kernels import residual_norm, residual_norm_bytes, residual_norm_flops


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Evaluate row by row."""
    sums, normed = [], []
    for n, row in enumerate(x):
        total = row if branch is None else row + branch[n]
        centred = total - total.sum() / len(total)
        sums.append(total)
        normed.append(centred / torch.sqrt((centred**2).sum() / len(total) + eps) * weight + bias)
    return torch.stack(sums), torch.stack(normed)


@pytest.mark.parametrize("branched", [True, False], ids=["branch", "no branch"])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 7), seed=st.integers(0, 99))
def test_values_and_gradients(branched: bool, rows: int, width: int, seed: int) -> None:
    shapes = {"x": (rows, width), "branch": (rows, width), "weight": (width,), "bias": (width,)}
    given = {name: draw(*shape, seed=seed + i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}
    if not branched:
        given["branch"] = None
    leaves = [t for t in given.values() if t is not None]
    upstream = [draw(rows, width, seed=seed + i) for i in (7, 8)]
    ours = residual_norm(**given, eps=1e-3)
    theirs = plain(**given, eps=1e-3)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(outputs, leaves, upstream) for outputs in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("branched", [True, False], ids=["branch", "no branch"])
def test_no_rows(branched: bool) -> None:
    x, weight = draw(0, 5, seed=0).requires_grad_(), draw(5, seed=1).requires_grad_()
    total, normed = residual_norm(x, x.detach() if branched else None, weight, weight)
    assert total.shape == normed.shape == (0, 5)
    (total.sum() + normed.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 5)
    assert weight.grad is not None
    assert not weight.grad.any()


REFUSED = {
    "x": ({"x": torch.zeros(3)}, "x has shape"),
    "branch": ({"branch": torch.zeros(4, 2, dtype=torch.float64)}, "branch has shape"),
    "branch type": ({"branch": torch.zeros(4, 3)}, "branch is torch.float32"),
    "weight": ({"weight": torch.zeros(2, dtype=torch.float64)}, "weight has shape"),
    "bias": ({"bias": torch.zeros(3)}, "bias is torch.float32"),
    "eps": ({"eps": 0.0}, "eps is 0.0"),
    "triton in float64": ({"backend": "triton"}, "x is torch.float64; backend .triton. needs"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    row = draw(3, seed=2)
    given = {"x": draw(4, 3, seed=0), "branch": draw(4, 3, seed=1), "weight": row, "bias": row}
    with pytest.raises(ValueError, match=message):
        residual_norm(**(given | change))


def test_counts_by_hand() -> None:
    assert residual_norm_bytes(10, 4) == 2 * (4 * 40 + 2 * 4)
    assert residual_norm_bytes(10, 4, branch=False, element=4) == 4 * (2 * 40 + 2 * 4)
    assert residual_norm_bytes(10, 4, backward=True) == 2 * (4 * 40 + 3 * 4)
    assert residual_norm_flops(10, 4) == 320
    assert residual_norm_flops(10, 4, branch=False) == 280
    assert residual_norm_flops(10, 4, backward=True) == 480
