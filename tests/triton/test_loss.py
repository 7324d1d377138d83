"""stopgrad_l2 on Triton against float64."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.kernels import stopgrad_l2

operator = import_module("iwm_fast.kernels.stopgrad_l2")  # in the package this name is the function
TYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]


def draw(rows, width, seed, dtype=torch.float32, device="cpu", size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * size).to(device, dtype)


def both(pred, target, incoming=1.0, **options):
    """Return (loss, gradient) of the Triton backend, of the reference in the same dtype, and in float64."""
    found = []
    index = options.pop("index", None)
    for backend, p, t in (("triton", pred, target), ("reference", pred, target), ("exact", pred, target)):
        exact = backend == "exact"
        leaf = (p.double().cpu() if exact else p.clone()).requires_grad_()
        place = index.cpu() if exact and index is not None else index
        other = t.double().cpu() if exact else t
        loss = stopgrad_l2(leaf, other, index=place, backend="reference" if exact else backend, **options)
        found.append((loss.detach(), torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))[0]))
    return found


def distance(a, b):
    size = b.double().norm().cpu()
    return float((a.double().cpu() - b.double().cpu()).norm() / (size if size > 0 else 1))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(max_examples=12)
@given(
    rows=st.integers(0, 70),
    width=st.sampled_from([1, 7, 100, 192, 384, 768, 1280]),
    indexed=st.booleans(),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "token_mean", "sum"]),
    incoming=st.sampled_from([1.0, 3.0, -0.37, 1e-3]),
    size=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_value_and_gradient(dtype, rows, width, indexed, normalize, reduction, incoming, size, seed, device):
    """fp32 to 1e-5; in half the gradient is rounded once, like the reference's, and the value is still fp32."""
    pred = draw(rows, width, seed, dtype, device, size)
    target = draw(31 if indexed else rows, width, seed + 1, dtype, device, size)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 31, (rows,), generator=generator).to(device) if indexed else None
    options = {"index": index, "normalize_target": normalize, "reduction": reduction, "eps": 1e-3}
    (loss, grad), (_, eager), (exact, exact_grad) = both(pred, target, incoming, **options)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert distance(loss, exact) <= 1e-5
    if dtype == torch.float32:
        assert distance(grad, exact_grad) <= 1e-5
    else:
        assert distance(grad, exact_grad) <= 1.1 * distance(eager, exact_grad) + 1e-6


def test_no_rows_give_zero_and_an_empty_gradient(device):
    pred = draw(0, 5, 0, device=device).requires_grad_()
    loss = stopgrad_l2(pred, draw(4, 5, 1, device=device), index=torch.zeros(0, dtype=torch.int64, device=device))
    loss = stopgrad_l2(pred, draw(0, 5, 1, device=device), backend="triton")
    loss.backward()
    assert loss == 0
    assert pred.grad.shape == (0, 5)


def test_the_target_never_gets_a_gradient(device):
    pred = draw(6, 9, 0, device=device).requires_grad_()
    target = draw(6, 9, 1, device=device).requires_grad_()
    stopgrad_l2(pred, target * 2, normalize_target=True, backend="triton").backward()
    assert pred.grad is not None
    assert target.grad is None
    assert not stopgrad_l2(pred.detach(), target, backend="triton").requires_grad


def test_every_backward_pass_is_right_whatever_came_before(device):
    """The first pass returns the precomputed gradient, the second recomputes it; they do not share memory."""
    pred, target = draw(33, 48, 0, device=device), draw(33, 48, 1, device=device)
    leaf = pred.requires_grad_()
    loss = stopgrad_l2(leaf, target, backend="triton")
    grads = [
        torch.autograd.grad(loss, leaf, torch.tensor(factor, device=device), retain_graph=True)[0]
        for factor in (2.0, 1.0, 1.0, 0.5)
    ]
    expected = 2 * (pred.detach() - target) / pred.numel()
    for grad, factor in zip(grads, (2.0, 1.0, 1.0, 0.5), strict=True):
        torch.testing.assert_close(grad, factor * expected)


def test_a_loss_scale_is_applied_before_the_cast(device):
    """2 · 1e-3 / 4096 is below half the smallest float16; scaled by 64 it is not."""
    pred = torch.full((64, 64), 1e-3, dtype=torch.float16, device=device).requires_grad_()
    loss = stopgrad_l2(pred, torch.zeros(64, 64, dtype=torch.float16, device=device), backend="triton") * 64
    loss.backward()
    expected = 2 * pred.detach().double() / 4096 * 64
    assert (pred.grad.double() - expected).abs().max() <= 2**-25


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("where", ["pred", "target"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_silent(bad, where, dtype, device):
    tensors = {"pred": draw(9, 24, 0, dtype, device), "target": draw(9, 24, 1, dtype, device)}
    tensors[where][4, 7] = bad
    (loss, grad), _, _ = both(**tensors, normalize_target=True)
    assert not loss.isfinite()
    others = torch.arange(9, device=device) != 4
    assert grad[others].isfinite().all()
    assert not grad[4].isfinite().all()


def test_a_row_that_target_does_not_have_is_never_silent(device):
    """On the CPU the public function refuses it; on a device a check would synchronise, so the kernel returns NaN."""
    pred, target = draw(3, 8, 0, device=device), draw(4, 8, 1, device=device)
    index = torch.tensor([0, 4, 2], device=device)
    loss, grad = torch.ops.iwm_fast.stopgrad_l2(pred, target, index, False, 1.0, 1e-6, True)
    assert loss.isnan()
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("incoming", [1.0, 3.0])
def test_a_prediction_without_target_adds_nothing_whatever_it_is(dtype, incoming, device):
    pred, target = draw(70, 24, 0, dtype, device), draw(4, 24, 1, dtype, device)
    index = torch.arange(70, device=device) % 5 - 1
    pred[index == -1] = float("nan")
    ours, theirs, exact = both(pred, target, incoming, index=index, normalize_target=True, reduction="sum")
    assert distance(ours[0], exact[0]) <= 1e-5
    assert distance(ours[1], exact[1]) <= 1.01 * distance(theirs[1], exact[1]) + 1e-5
    assert not ours[1][index == -1].any()


def test_non_contiguous_inputs_give_the_same(device):
    pred, target = draw(20, 36, 0, device=device), draw(12, 36, 1, device=device)
    index = torch.arange(40, device=device)[::2] % 12
    strided = both(pred.t().contiguous().t(), target.t().contiguous().t(), index=index, normalize_target=True)[0]
    plain = both(pred, target, index=index.contiguous(), normalize_target=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_element_is_written_and_equal_inputs_give_equal_bits(dtype, device, monkeypatch):
    pred, target = draw(77, 100, 0, dtype, device), draw(77, 100, 1, dtype, device)
    expected = both(pred, target, 3.0, normalize_target=True)[0]
    empty = torch.empty

    def poisoned(*shape, **options):
        fresh = empty(*shape, **options)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)
    found = both(pred, target, 3.0, normalize_target=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_written_if_no_gradient_is_required(device):
    pred, target = draw(8, 16, 0, device=device), draw(8, 16, 1, device=device)
    for with_grad, rows in ((True, 8), (False, 0)):
        _, grad = torch.ops.iwm_fast.stopgrad_l2(pred, target, None, True, 1.0, 1e-6, with_grad)
        assert grad.shape == (rows, 16)
    with torch.no_grad():
        assert stopgrad_l2(pred.requires_grad_(), target, backend="triton").grad_fn is None


@pytest.mark.parametrize(
    ("width", "rows", "dtype"),
    [(24, 77, torch.float32), (100, 53, torch.float16), (384, 37, torch.bfloat16), (1280, 13, torch.bfloat16)],
    ids=str,
)
def test_few_programs_scale_every_row_or_leave_all_as_they_are(width, rows, dtype, device, monkeypatch):
    """More blocks of rows than programs, the last one partial; equal inputs give equal bits."""
    monkeypatch.setattr(operator, "_FEW_PROGRAMS", 2)
    pred, target = draw(rows, width, 0, dtype, device), draw(rows, width, 1, dtype, device)
    (loss, scaled), _, (exact, exact_grad) = both(pred, target, -3.0, normalize_target=True, eps=1e-3)
    assert distance(loss, exact) <= 1e-5
    assert distance(scaled, exact_grad) <= max(1e-5, torch.finfo(dtype).eps)
    again = both(pred, target, -3.0, normalize_target=True, eps=1e-3)[0]
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], scaled)
    grad = torch.full_like(pred, 7.0)
    one = torch.ones(1, device=device)
    operator.launch_distance(pred, target, None, True, 1.0, 1e-3, grad=grad, incoming=one, skip_one=True)
    assert (grad == 7.0).all()


@pytest.mark.parametrize("count", [1, 5, 1024, 3001])
def test_the_total_is_summed_in_float64_and_rounded_once(count, device):
    sums = draw(1, count, 3, device=device)[0]
    sums[0] = 2.0**24  # an fp32 sum would lose what comes after
    out = torch.full((), float("nan"), device=device)
    operator.launch_total(sums, 0.5, out)
    assert out.item() == (sums.double().sum() * 0.5).float().item()
