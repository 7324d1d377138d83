"""The reference of e4m3_rows against table-based rounding in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from e4m3 import draw, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.kernels import e4m3_rows

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 9), width=st.integers(1, 70), sizes=st.floats(0, 4), seed=st.integers(0, 999))
def test_code_times_scale_is_the_rounded_row(
    dtype: torch.dtype, rows: int, width: int, sizes: float, seed: int
) -> None:
    """float64 values are rounded through fp32, so the expected result starts from fp32."""
    x = draw(rows, width, seed, sizes, dtype)
    codes, scale = e4m3_rows(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == x.shape
    assert scale.shape == (rows, 1)
    assert np.array_equal((codes.double() * scale).numpy(), rounded(x.double().numpy()))
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))  # a power of two
    assert ((codes.double().abs().amax(1) >= 224) | (x == 0).all(1)).all()


def test_gelu_comes_first_and_is_rounded_to_the_inputs_type() -> None:
    x = draw(9, 33, 0, 1.0, torch.bfloat16)
    for found, expected in zip(e4m3_rows(x, activation="gelu"), e4m3_rows(torch.nn.functional.gelu(x)), strict=True):
        assert torch.equal(found.double(), expected.double())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nan_and_no_other_row(value: float) -> None:
    x = torch.ones(3, 5)
    x[1, 2] = value
    codes, scale = e4m3_rows(x)
    assert codes[1, 2].double().isnan()
    assert torch.equal((codes.float() * scale)[[0, 2]], x[[0, 2]])


def test_wrong_arguments_say_what_is_wrong() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="x has shape"):
        e4m3_rows(x[0])
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        e4m3_rows(x.long())
    with pytest.raises(ValueError, match="x has no columns"):
        e4m3_rows(x[:, :0])
    with pytest.raises(ValueError, match="activation is 'relu'"):
        e4m3_rows(x, activation="relu")
    with pytest.raises(ValueError, match="x requires a gradient"):
        e4m3_rows(x.requires_grad_())
