"""predictor_input on Triton against float64: values rounded once, gradients copied or summed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import cast
from predictor_parts import PARTS, parts
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.kernels import predictor_input, predictor_input_flops
from iwm_fast.kernels._lib import rows as row_blocks

TYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("context", "context_patches", "position", "place", "mask_token", "predicted_patches", "rows")


def outcome(given, backend="triton"):
    leaves = {name: value for name, value in given.items() if value.requires_grad}
    out = predictor_input(**given, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)  # exact in every type
    grads = torch.autograd.grad(out, list(leaves.values()), upstream, materialize_grads=True)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(max_examples=8)
@given(shape=PARTS, width=st.sampled_from([1, 7, 100, 192, 384]))
def test_values_and_gradients(dtype, shape, width, device):
    """Values and copied gradients are float64's rounded once; the mask token's is an fp32 sum of 40 values."""
    given = parts(**shape, width=width, dtype=dtype, device=device)
    found, exact = outcome(given), outcome(cast(given, torch.float64, "cpu"), "reference")
    for name in found.keys() - {"mask_token"}:
        assert found[name].dtype == dtype
        # fp32: both terms are exact, so their float64 sum rounds to what one fp32 addition gives.
        assert torch.equal(found[name].cpu(), exact[name].to(dtype)), name
    if "mask_token" in found:
        torch.testing.assert_close(
            found["mask_token"].double().cpu(), exact["mask_token"],
            rtol=torch.finfo(dtype).eps, atol=40 * torch.finfo(torch.float32).eps,
        )  # fmt: skip


def test_many_rows_a_program_are_summed_in_full(device, monkeypatch):
    """More blocks of tokens than programs: each then iterates over several, the last over fewer."""
    monkeypatch.setattr(row_blocks, "SUM_PROGRAMS", 3)
    given = parts(45, 90, 20, width=24, device=device)
    found, exact = outcome(given), outcome(cast(given, torch.float64, "cpu"), "reference")
    torch.testing.assert_close(found["mask_token"].double().cpu(), exact["mask_token"], rtol=1e-5, atol=1e-5)
    for name in ("context", "rows"):
        assert torch.equal(found[name].cpu(), exact[name].float())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_element_is_written_and_equal_inputs_give_equal_bits(dtype, device, monkeypatch):
    given = parts(21, 33, 18, width=100, dtype=dtype, device=device)
    expected = outcome(given)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    found = outcome(given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_non_contiguous_inputs_give_the_same(device):
    given = parts(20, 12, 9, width=36, device=device)
    strided = dict(given)
    for name in ("context", "rows", "position"):
        strided[name] = given[name].detach().t().contiguous().t().requires_grad_(given[name].requires_grad)
    for name in ("mask_token", "place", "context_patches", "predicted_patches"):
        doubled = given[name].detach().repeat_interleave(2)
        strided[name] = doubled[::2].requires_grad_(given[name].requires_grad)
    found, expected = outcome(strided), outcome(given)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_position_that_is_not_there_is_never_silent(device):
    """On the CPU the public function refuses it; on a device a check would synchronise, so the kernel returns NaN."""
    given = {name: value.detach() for name, value in parts(3, 2, 1, width=8, device=device).items()}
    given["context_patches"][1] = 9
    out = torch.ops.iwm_fast.predictor_input(*(given[name] for name in NAMES))
    bad = torch.arange(6, device=device) == given["place"][1]
    assert out[bad].isnan().all()
    assert out[~bad].isfinite().all()


@pytest.mark.parametrize("sizes", [(7, 5, None), (7, None, 4), (0, 5, 4)], ids=["mask", "rows", "both, no context"])
def test_opcheck(sizes, device):
    given = parts(*sizes, width=24, device=device)
    torch.library.opcheck(torch.ops.iwm_fast.predictor_input.default, tuple(given.get(name) for name in NAMES))
    grad = torch.randn(len(given["place"]), 24, device=device)
    saved = (grad, given["place"], sizes[0], sizes[1] or 0)
    torch.library.opcheck(torch.ops.iwm_fast.predictor_input_backward.default, saved)


def test_operations_are_counted_by_formula(device):
    with FlopCounterMode(display=False) as counter:
        outcome(parts(7, 5, 4, width=8, device=device))
    assert counter.get_total_flops() == sum(predictor_input_flops(7, 5, 8, backward=b) for b in (False, True))
