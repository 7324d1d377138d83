"""e4m3_rows on Triton against the reference, which tests/kernels/test_e4m3_rows.py compares with NumPy."""

from __future__ import annotations

import math

import pytest
import torch
from e4m3 import draw as draw_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.kernels import e4m3_rows, e4m3_rows_flops, use_backend
from iwm_fast.models.fp8 import fp8_linear

# Half a step of each dtype, relative, and of its smallest, which only fp16 reaches.
TYPES = {torch.float32: (2.0**-24, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0)}


def draw(rows, width, seed, dtype, device):
    return draw_rows(rows, width, seed, 4.0, dtype).to(device)


def numbers(codes, scale):
    return codes.double() * scale.double()


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@settings(max_examples=15)
@given(
    rows=st.integers(0, 40), width=st.sampled_from([1, 7, 100, 192, 384, 768, 1280]), seed=st.integers(0, 99),
)  # fmt: skip
def test_codes_and_scales_are_the_references(dtype, rows, width, seed, device):
    x = draw(rows, width, seed, dtype, device)
    codes, scale = e4m3_rows(x, backend="triton")
    expected, expected_scale = e4m3_rows(x, backend="reference")
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes.double(), expected.double())


def test_every_number_and_every_middle_between_two(device):
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, middles, torch.nextafter(middles, torch.tensor(1e9))]).to(device)
    x = torch.cat([x, -x, torch.tensor([448.0], device=device)])[None]
    codes, scale = e4m3_rows(x, backend="triton")
    expected, _ = e4m3_rows(x, backend="reference")
    assert float(scale) == 1
    assert torch.equal(codes.double(), expected.double())


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
def test_gelu_is_rounded_to_the_inputs_type_first(dtype, device):
    """Half a step of that dtype, with the error of the sum 1 + erf, then half a step of e4m3, 2⁻⁴, or half its
    smallest, 2⁻¹⁰ of a scale of at most 2 / 448 of a row's maximum. Another erf may differ by a rounding, which changes
    a few of those to e4m3."""
    relative, smallest = TYPES[dtype]
    x = draw(31, 100, 3, dtype, device)
    found = numbers(*e4m3_rows(x, activation="gelu", backend="triton"))
    exact = torch.nn.functional.gelu(x.double())
    rounded = relative * exact.abs() + smallest + 2.0**-23 * x.double().abs()
    least = 2 / 448 * 2.0**-10 * exact.abs().amax(1, keepdim=True)
    bound = rounded + torch.maximum(2.0**-4 * (exact.abs() + rounded), least)
    assert ((found - exact).abs() <= 1.001 * bound).all()
    assert (found == numbers(*e4m3_rows(x, activation="gelu", backend="reference"))).double().mean() > 0.98


def test_rows_without_a_size_and_rows_that_are_not_finite(device):
    x = torch.ones(6, 5, device=device)
    x[0] = 0
    x[1] = 1e-41
    x[2, 3], x[3, 0], x[4, 4] = math.nan, math.inf, -math.inf
    codes, scale = e4m3_rows(x, backend="triton")
    found = numbers(codes, scale)
    assert (found[:2] == 0).all()
    assert scale[0] == 2.0**-126
    assert found[2, 3].isnan()
    assert found[3, 0].isnan()
    assert found[4, 4].isnan()
    assert torch.equal(found[5], x[5].double())


def test_rows_that_do_not_lie_together(device):
    x = draw(40, 30, 1, torch.float32, device)
    for view in (x.t(), x[::3], x[:, ::2], x[:, 3:20]):
        codes, scale = e4m3_rows(view, backend="triton")
        assert torch.equal(numbers(codes, scale), numbers(*e4m3_rows(view, backend="reference")))
        assert codes.is_contiguous()


def test_a_matmul_takes_its_operands_from_here(device):
    x, weight, bias = (draw(rows, 48, rows, torch.bfloat16, device) for rows in (9, 32, 1))
    with use_backend("reference"):
        expected = fp8_linear(x, weight, bias[0, :32].contiguous())
    with use_backend("triton"):
        assert torch.equal(fp8_linear(x, weight, bias[0, :32].contiguous()), expected)


def test_opcheck_and_operations(device):
    x = draw(9, 20, 0, torch.float32, device)
    torch.library.opcheck(torch.ops.iwm_fast.e4m3_rows.default, (x, "gelu"))
    with FlopCounterMode(display=False) as counter:
        e4m3_rows(x, backend="triton")
    assert counter.get_total_flops() == e4m3_rows_flops(9, 20)
