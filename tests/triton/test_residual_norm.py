"""residual_norm on Triton against float64, and against the error of the eager reference in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import cast, conditions, distances
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.kernels import residual_norm, residual_norm_flops
from iwm_fast.kernels._lib import rows as row_blocks

TYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
BRANCHED = pytest.mark.parametrize("branched", [True, False], ids=["branch", "no branch"])


def inputs(rows, width, branched, seed=0, dtype=torch.float32, device="cpu", size=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, size=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(device, dtype).requires_grad_()

    stream = {"x": draw(rows, width, size=size), "branch": draw(rows, width, size=size) if branched else None}
    return stream | {"weight": draw(width), "bias": draw(width, size=0.3)}


def outcome(given, backend="triton", used=(True, True)):
    """Return both results and every gradient, for upstream gradients that are exact in every dtype."""
    leaves = {name: value for name, value in given.items() if value is not None}
    results = residual_norm(**given, eps=1e-3, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results]
    outputs, upstream = zip(*((r, u) for r, u, use in zip(results, upstream, used, strict=True) if use), strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    return dict(zip(("s", "n"), (r.detach() for r in results), strict=True)) | dict(zip(leaves, grads, strict=True))


@BRANCHED
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(max_examples=8)
@given(
    rows=st.integers(1, 70),
    width=st.sampled_from([7, 100, 192, 384, 768, 1280]),
    size=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients(branched, dtype, rows, width, size, seed, device):
    """fp32 to 1e-5; in half at most 1.5 times eager's error, or the effect of one rounding of all values on each
    result. Both times the amplification of a rounding by cancellation.

    s is rounded before it is normalised, as in eager: against float64 both have that error.
    """
    given = inputs(rows, width, branched, seed, dtype, device, size)

    def evaluate(moved):
        return outcome(moved, "reference")

    exact = evaluate(cast(given, torch.float64, "cpu"))
    larger = conditions(given, exact, evaluate)
    ours, eager = distances(outcome(given), exact), distances(outcome(given, "reference"), exact)
    for name, error in ours.items():
        one = torch.finfo(dtype).eps / 2 * larger[name]
        limit = 1e-5 * larger[name] if dtype == torch.float32 else max(1.5 * eager[name], one)
        assert error <= limit, (name, error, eager[name], larger[name])


@BRANCHED
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["s alone", "n alone"])
def test_one_result_alone_may_be_differentiated(used, branched, device):
    given = inputs(9, 24, branched, device=device)
    ours, exact = outcome(given, used=used), outcome(cast(given, torch.float64, "cpu"), "reference", used)
    for name, wanted in exact.items():
        if wanted is None:
            assert ours[name] is None
        else:
            torch.testing.assert_close(ours[name].double().cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_many_rows_a_program_are_summed_in_full(device, monkeypatch):
    """More blocks of rows than programs: each then iterates over several, the last over fewer."""
    monkeypatch.setattr(row_blocks, "SUM_PROGRAMS", 3)
    given = inputs(101, 384, branched=False, device=device)
    ours, exact = outcome(given), outcome(cast(given, torch.float64, "cpu"), "reference")
    assert max(distances(ours, exact).values()) <= 1e-5


@BRANCHED
def test_no_rows(branched, device):
    found = outcome(inputs(0, 5, branched, device=device))
    assert found["s"].shape == found["n"].shape == found["x"].shape == (0, 5)
    assert not found["weight"].any()
    assert not found["bias"].any()


@BRANCHED
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_element_is_written_and_equal_inputs_give_equal_bits(branched, dtype, device, monkeypatch):
    given = inputs(77, 100, branched, dtype=dtype, device=device)
    expected = outcome(given)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    found = outcome(given)
    assert all(torch.equal(found[name], value) for name, value in expected.items() if value is not None)


@BRANCHED
def test_non_contiguous_inputs_give_the_same(branched, device):
    given = inputs(20, 36, branched, device=device)
    strided = {
        name: None if value is None
        else value.detach().t().contiguous().t().requires_grad_() if value.dim() == 2
        else value.detach().repeat_interleave(2)[::2].requires_grad_()
        for name, value in given.items()
    }  # fmt: skip
    found, expected = outcome(strided), outcome(given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad, dtype, device):
    given = inputs(9, 24, branched=True, dtype=dtype, device=device)
    with torch.no_grad():
        given["branch"][4, 7] = bad
    found = outcome(given)
    others = torch.arange(9, device=device) != 4
    for name in ("s", "n", "x", "branch"):
        assert not found[name][4].isfinite().all()
        assert found[name][others].isfinite().all()
    assert not found["weight"].isfinite().all()


@BRANCHED
def test_opcheck(branched, device):
    given = inputs(9, 24, branched, device=device)
    torch.library.opcheck(torch.ops.iwm_fast.residual_norm.default, (*given.values(), 1e-6))
    x, grad, weight = given["x"].detach(), torch.randn(9, 24, device=device), given["weight"].detach()
    for dtotal in (None, torch.randn(9, 24, device=device)):
        torch.library.opcheck(torch.ops.iwm_fast.residual_norm_backward.default, (grad, dtotal, x, weight, 1e-6))


@BRANCHED
def test_compiled_and_checkpointed_it_is_the_same(branched, device):
    given = inputs(9, 24, branched, device=device)

    def step(x, branch, weight, bias):
        total, normed = residual_norm(x * 2, branch, weight, bias, backend="triton")
        return (total * normed).square().sum()

    leaves = [value for value in given.values() if value is not None]
    expected = torch.autograd.grad(step(**given), leaves)
    again = checkpoint(step, *given.values(), use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, leaves), expected, strict=True))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(**given), leaves), expected)


@BRANCHED
def test_operations_are_counted_by_formula(branched, device):
    with FlopCounterMode(display=False) as counter:
        outcome(inputs(6, 8, branched, device=device))
    expected = residual_norm_flops(6, 8, branch=branched) + residual_norm_flops(6, 8, backward=True)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("width", "rows", "dtype"),
    [
        (24, 37, torch.float32), (100, 37, torch.bfloat16), (192, 37, torch.float16), (384, 21, torch.bfloat16),
        (768, 11, torch.float32), (1280, 11, torch.bfloat16), (1280, 5, torch.float32), (2050, 5, torch.float16),
    ],
    ids=str,
)  # fmt: skip
def test_odd_numbers_of_rows_are_summed_in_full_and_in_order(width, rows, dtype, device, monkeypatch):
    """Several rows per warp, one, and one per program; the last program has fewer rows, and a partial block."""
    monkeypatch.setattr(row_blocks, "SUM_PROGRAMS", 2)
    given = inputs(rows, width, branched=False, dtype=dtype, device=device)
    found, exact = outcome(given), outcome(cast(given, torch.float64, "cpu"), "reference")
    assert max(distances(found, exact).values()) <= max(1e-5, torch.finfo(dtype).eps)
    again = outcome(given)
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("element", [2, 4])
def test_rows_are_covered_by_whole_warps_or_spread_over_a_program(element):
    for width in range(1, 6000, 7):
        block_n, block_d, parts, warps = row_blocks.rows_in_warps(width, element)
        assert block_d * parts >= width
        assert block_n == 1 or block_n * block_d == 32 * warps * 16 // element
    for width in (192, 384, 768, 1024):
        assert row_blocks.rows_in_warps(width, element)[1] * row_blocks.rows_in_warps(width, element)[2] == width
