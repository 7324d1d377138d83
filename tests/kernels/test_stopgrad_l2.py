"""stopgrad_l2 against a float64 evaluation prediction by prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.kernels import stopgrad_l2, stopgrad_l2_bytes, stopgrad_l2_flops


def draw(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(pred: Tensor, target: Tensor, index: Tensor | None, normalize: bool, reduction: str, eps: float) -> Tensor:
    """Evaluate prediction by prediction."""
    total = pred.new_zeros(())
    for n, row in enumerate(pred):
        wanted = target[n if index is None else int(index[n])].detach()
        if normalize:
            centred = wanted - wanted.sum() / len(wanted)
            wanted = centred / torch.sqrt((centred**2).sum() / len(wanted) + eps)
        total = total + ((row - wanted) ** 2).sum()
    if not len(pred):
        return total
    return total / {"sum": 1, "token_mean": len(pred), "mean": pred.numel()}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as it is"])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "row by row"])
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(0, 9), width=st.integers(1, 7), seed=st.integers(0, 99))
def test_value_and_gradient(indexed: bool, normalize: bool, reduction: str, rows: int, width: int, seed: int) -> None:
    target = draw(5 if indexed else rows, width, seed + 1)
    index = torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(seed)) if indexed else None
    ours = draw(rows, width, seed).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    eps = 1e-3
    loss = stopgrad_l2(ours, target, index=index, normalize_target=normalize, reduction=reduction, eps=eps)
    expected = plain(theirs, target, index, normalize, reduction, eps)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    if rows:
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    else:
        assert loss == 0
        assert ours.grad is not None
        assert ours.grad.shape == (0, width)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as it is"])
def test_a_prediction_without_target_adds_nothing_whatever_it_is(normalize: bool) -> None:
    pred, target = draw(5, 3, 0), draw(4, 3, 1)
    pred[1], pred[4] = 1e3, float("nan")
    index, has = torch.tensor([2, -1, 0, 2, -1]), torch.tensor([0, 2, 3])
    ours, theirs = pred.requires_grad_(), pred.detach()[has].requires_grad_()
    loss = stopgrad_l2(ours, target, index=index, normalize_target=normalize, reduction="sum", scale=3.0)
    expected = stopgrad_l2(theirs, target, index=index[has], normalize_target=normalize, reduction="sum", scale=3.0)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, ours)
    assert torch.equal(gradient[has], torch.autograd.grad(expected, theirs)[0])
    assert not gradient[[1, 4]].any()


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
def test_a_mean_refuses_predictions_without_target(reduction: str) -> None:
    with pytest.raises(ValueError, match="index spans -1 to 0; target has rows 0 to 3"):
        stopgrad_l2(draw(2, 3, 0), draw(4, 3, 1), index=torch.tensor([0, -1]), reduction=reduction)


@pytest.mark.parametrize("wanted", [True, False], ids=["target wants a gradient", "target does not"])
def test_target_never_gets_a_gradient(wanted: bool) -> None:
    pred, leaf = draw(4, 3, 0).requires_grad_(), draw(6, 3, 1).requires_grad_(wanted)
    index = torch.tensor([5, 0, 0, 2])
    stopgrad_l2(pred, leaf * 2, index=index, normalize_target=True).backward()
    assert leaf.grad is None
    assert pred.grad is not None
    assert not stopgrad_l2(pred.detach(), leaf, index=index).requires_grad


def test_half_is_computed_and_returned_in_fp32() -> None:
    """The inputs are exact in both dtypes, so only fp32 rounding may differ: 64 · 96 terms, 1e-5 relative is ample."""
    pred, target = draw(64, 96, 0).bfloat16(), draw(64, 96, 1).bfloat16()
    loss = stopgrad_l2(pred, target, normalize_target=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), stopgrad_l2(pred.double(), target.double(), normalize_target=True), rtol=1e-5, atol=0
    )


def test_loss_scale_is_applied_before_the_cast() -> None:
    """2 · 1e-3 / 4096 is below half the smallest float16; scaled by 65536 it is not."""
    pred = torch.full((64, 64), 1e-3, dtype=torch.float16).requires_grad_()
    loss = stopgrad_l2(pred, torch.zeros(64, 64, dtype=torch.float16)) * (65536.0 / 1024)
    loss.backward()
    assert pred.grad is not None
    expected = 2 * pred.detach().double() / 4096 * 64
    assert (pred.grad.double() - expected).abs().max() <= 2**-25  # half a step of float16's subnormals


def test_nothing_is_saved_without_gradients() -> None:
    pred, target = draw(4, 3, 0).requires_grad_(), draw(4, 3, 1)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert stopgrad_l2(pred, target).grad_fn is None
        stopgrad_l2(pred.detach(), target)
        assert not saved
        stopgrad_l2(pred, target)
        assert len(saved) == 1


def test_same_bits_every_time() -> None:
    pred, target = draw(501, 33, 0).float(), draw(501, 33, 1).float()
    assert len({stopgrad_l2(pred, target).item() for _ in range(5)}) == 1


REFUSED = {
    "pred": ({"pred": torch.zeros(3)}, "pred has shape"),
    "pred integer": ({"pred": torch.zeros(4, 3, dtype=torch.int64)}, "pred is torch.int64"),
    "target": ({"target": torch.zeros(4, 2, dtype=torch.float64)}, "target has shape"),
    "target rows": ({"target": torch.zeros(5, 3, dtype=torch.float64)}, "target has shape"),
    "target type": ({"target": torch.zeros(4, 3)}, "target is torch.float32"),
    "index": ({"index": torch.zeros(3, dtype=torch.int64)}, "index has shape"),
    "index type": ({"index": torch.zeros(4, dtype=torch.int32)}, "index is torch.int32"),
    "index range": ({"index": torch.tensor([0, 1, 4, 0])}, "index spans 0 to 4"),
    "index negative": ({"index": torch.tensor([0, -1, 2, 0])}, "index spans -1 to 2"),
    "reduction": ({"reduction": "max"}, "reduction is 'max'"),
    "eps": ({"eps": -1.0}, "eps is -1.0"),
    "triton in float64": ({"backend": "triton"}, "pred is torch.float64; backend .triton. needs"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stopgrad_l2(**({"pred": draw(4, 3, 0), "target": draw(4, 3, 1)} | change))


def test_counts_by_hand() -> None:
    assert stopgrad_l2_bytes(10, 4) == 10 * (3 * 4 * 2 + 8)
    assert stopgrad_l2_bytes(10, 4, element=4, indexed=False, gradient=False) == 10 * 2 * 4 * 4
    assert stopgrad_l2_flops(10, 4) == 160
    assert stopgrad_l2_flops(10, 4, normalize_target=True) == 360


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
def test_scale_multiplies_loss_and_gradient(reduction: str) -> None:
    pred, target = draw(5, 7, 0).requires_grad_(), draw(5, 7, 1)
    plain = stopgrad_l2(pred, target, reduction=reduction)
    scaled = stopgrad_l2(pred, target, reduction=reduction, scale=0.125)
    assert torch.equal(scaled, plain * 0.125)
    grads = [torch.autograd.grad(loss, pred)[0] for loss in (scaled, plain)]
    assert torch.equal(grads[0], grads[1] * 0.125)
