"""Sums in a fixed order, gradients of an action, and GELU, as the kernels compute them, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.kernels._lib.jit import gelu, gelu_and_slope
from iwm_fast.kernels._lib.slices import add_gradients, add_pairs, add_slices
from iwm_fast.kernels._mlp.image_sums import action_gradients, column_sums, image_kernel, image_of_rows, segment_sums
from iwm_fast.kernels._mlp.weight_grad import weight_grad_slices
from iwm_fast.kernels._tuning.candidates import Choice
from iwm_fast.kernels._tuning.tuner import use_tuner

TYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half a step, relative, and the smallest value of a dtype (subnormals included).
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def bounds_of(lengths, device):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), width=st.sampled_from([1, 17, 130]))
def test_rows_of_each_image_are_summed_and_named(lengths, width, device):
    rows, bounds = sum(lengths), bounds_of(lengths, device)
    x = draw(rows, width, device=device)
    out = torch.full((len(lengths), width), 7.0, device=device)
    segment_sums(x, bounds, 0, out, accumulate=False)
    expected = torch.stack([part.double().sum(0) for part in x.split(lengths)])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert torch.equal(image_of_rows(rows, bounds).cpu().long(), image)


def test_wrong_bounds_write_nothing_beside_the_rows(device):
    bounds = torch.tensor([-5, 3, 40], dtype=torch.int32, device=device)
    around = torch.full((30,), -7, dtype=torch.int32, device=device)
    image_kernel[(2,)](cu_seqlens_ptr=bounds, image_ptr=around[10:], N=8, BLOCK=16)
    assert around.tolist() == [-7] * 10 + [0] * 3 + [1] * 5 + [-7] * 12


def test_chunks_of_rows_that_cut_images_add_up(device):
    lengths = [30, 0, 45, 7]
    x, bounds = draw(82, 20, device=device), bounds_of(lengths, device)
    out = torch.empty(4, 20, device=device)
    for first in range(0, 82, 16):
        segment_sums(x[first : first + 16], bounds, first, out, accumulate=first > 0)
    expected = torch.stack([part.double().sum(0) for part in x.split(lengths)])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_columns_are_summed(rows, device):
    x = draw(rows, 33, device=device, dtype=torch.bfloat16)
    found = add_slices(column_sums(x), torch.float32)
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_slices_are_added_in_fp32_and_rounded_once(dtype, device):
    slices = draw(7, 37, 43, device=device)
    found = add_slices(slices, dtype)
    in_order = slices[0].clone()
    for part in slices[1:]:
        in_order += part
    assert found.dtype == dtype
    assert torch.equal(found, in_order.to(dtype))


def test_pairs_of_rows_go_to_two_tensors(device):
    slices = draw(5, 2, 1030, device=device)
    first, second = add_pairs(slices, torch.float32)
    torch.testing.assert_close(first.double(), slices[:, 0].double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.double(), slices[:, 1].double().sum(0), rtol=1e-5, atol=1e-5)


def test_nothing_is_added_to_nothing(device):
    assert add_slices(torch.empty(3, 0, device=device), torch.float32).shape == (0,)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("images", "units", "actions"), [(1, 1, 1), (37, 70, 5), (20, 65, 16), (3, 40, 20), (0, 9, 3), (5, 9, 65)]
)
def test_gradients_of_an_action_its_weight_and_the_bias(images, units, actions, dtype, device):
    dbias = draw(images, units, seed=1, device=device)
    action, w_action, b_in = (
        draw(*shape, seed=2 + i, device=device, dtype=dtype)
        for i, shape in enumerate([(images, actions), (units, actions), (units,)])
    )
    daction, dw, db = action_gradients(dbias, action, w_action, b_in)
    expected = {
        "action": (daction, dbias.double() @ w_action.double(), units),
        "w_action": (dw, dbias.double().t() @ action.double(), images),
        "b_in": (db, dbias.double().sum(0), images),
    }
    for name, (found, exact, terms) in expected.items():
        assert found.dtype == dtype
        size = 2.0**-22 * math.sqrt(terms + 1) * 4  # of a sum of this many values of about 1
        limit = 1.01 * HALF_STEP[dtype] * exact.abs() + size
        assert ((found.double() - exact).abs() <= limit).all(), name


@triton.jit
def gelu_of(u_ptr, value_ptr, twin_ptr, slope_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + o)
    tl.store(value_ptr + o, gelu(u, KIND))
    value, slope = gelu_and_slope(u, KIND)
    tl.store(twin_ptr + o, value)
    tl.store(slope_ptr + o, slope)


def computed(u, kind):
    """Return GELU alone, GELU beside its derivative, and the derivative, fp32."""
    assert len(u) % 1024 == 0
    found = [torch.empty_like(u) for _ in range(3)]
    gelu_of[(len(u) // 1024,)](u, *found, KIND=kind, BLOCK=1024)
    return found


def exact(u):
    """Return GELU and its derivative in float64, by erfc, which loses nothing in the tail."""
    u = u.double().cpu()
    phi = 0.5 * torch.special.erfc(-u / math.sqrt(2))
    return u * phi, phi + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_rational_form_is_as_good_as_erf_after_rounding_to_half_precision(dtype, device):
    """One step of the dtype, of the value or of 2⁻¹⁶, which hides the approximation's 1.5e-7 of u; and in the mean no
    worse than fp32's erf rounded alike."""
    u = torch.cat([torch.linspace(-12, 12, 2**15), torch.linspace(-0.01, 0.01, 2**12)]).to(device)
    wanted = exact(u)
    value, twin, slope = (t.to(dtype).double().cpu() for t in computed(u, "rational"))
    by_erf = [t.to(dtype).double().cpu() for t in computed(u, "erf")]
    exactly = (wanted[0], wanted[0], wanted[1])
    for found, other, true in zip((value, twin, slope), by_erf, exactly, strict=True):
        error = (found - true).abs()
        smallest = 2e-6  # the approximation's 1.5e-7, times |u| up to 12
        assert (error <= 1.01 * HALF_STEP[dtype] * true.abs() + smallest).all()
        assert error.mean() <= 1.02 * (other - true).abs().mean() + 1e-8


def test_the_rational_form_s_own_error_in_fp32(device):
    """7.1.26 promises 1.5e-7 of erf, so half of it of Φ; roundings of fp32 add a few units of 2⁻²⁴."""
    u = torch.linspace(-9, 9, 2**15).to(device)
    wanted = exact(u)
    for found, true in zip(computed(u, "rational"), (wanted[0], wanted[0], wanted[1]), strict=True):
        limit = 0.75e-7 * u.abs().clamp(min=1).double().cpu() + 8 * 2.0**-24 * true.abs() + 2e-7
        assert ((found.double().cpu() - true).abs() <= limit).all()


FINITE = [20.0, 20.0, 20.0, 20.0, 0.0, -0.0, -20.0, -20.0, -20.0, math.nan]
ENDS = {
    "rational": [3e38, 1e15, 1e9, 20.0, 0.0, -0.0, -20.0, -1e9, -3e38, math.nan],
    "erf": FINITE, "tanh": FINITE, "tanh_approx": FINITE,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", ENDS)
def test_ends_zeros_and_nan(kind, device):
    """Large values equal their limit; infinities have a test of their own."""
    u = torch.zeros(1024)
    u[:10] = torch.tensor(ENDS[kind])
    value, twin, slope = (t[:10].cpu() for t in computed(u.to(device), kind))
    for found in (value, twin):
        assert torch.equal(found[:4], u[:4])
        assert (found[4:6] == 0).all()
        assert (found[6:9].abs() <= 1e-30).all()
        assert found[9].isnan()
    assert (slope[:4] == 1).all()
    assert (slope[4:6] - 0.5).abs().max() <= 1e-7
    assert (slope[6:9].abs() <= 1e-30).all()
    assert slope[9].isnan()


def test_infinities_pass_through_the_rational_form_and_show_in_its_slope(device):
    u = torch.zeros(1024)
    u[0], u[1] = math.inf, -math.inf
    value, twin, slope = (t[:2].cpu() for t in computed(u.to(device), "rational"))
    assert value.tolist() == [math.inf, 0.0]
    assert twin[0] == math.inf
    assert not twin[1].isfinite()
    assert not slope.isfinite().any()


class Only:
    """Replaces the tuner: one choice."""

    def __init__(self, choice):
        self.choice = choice

    def run(self, *given):
        return given[3](self.choice)


CHOICES = [Choice("triton", 16, 32, 16, 4, 1), Choice("tma", 16, 32, 16, 4, 1), Choice("library")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.by)
@pytest.mark.parametrize(("rows", "p", "q"), [(1, 8, 8), (37, 24, 72), (53, 40, 8)])
def test_gradients_of_a_bias_come_from_the_pass_of_its_weight(choice, rows, p, q, dtype, device):
    """The bias's is as exact as an fp32 sum: ones multiply without rounding. Twice: a sum continues over slices."""
    a, b = (draw(rows, width, seed=width, device=device, dtype=dtype) for width in (p, q))
    weight, bias = torch.empty(p, q, device=device), torch.empty(p, device=device)
    with use_tuner(Only(choice)):
        slices = weight_grad_slices(a, b, bias=True)
        alone = weight_grad_slices(a, b)
    assert slices.shape[1] == p * q + p
    once = add_slices(slices, torch.float32)
    again = add_slices(slices, torch.float32, once)[None]
    for times, sums in ((1, slices), (2, again)):
        dweight, dbias = add_gradients(sums, weight, bias=bias)
        torch.testing.assert_close(dweight.double(), times * a.double().t() @ b.double(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dbias.double(), times * a.double().sum(0), rtol=1e-6, atol=1e-5)
    plain, none = add_gradients(alone, weight)
    assert none is None
    assert torch.equal(plain, add_gradients(slices, weight, bias=bias)[0])
