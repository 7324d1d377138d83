"""fp8 matmuls against NumPy's, with its own rounding to e4m3, and the target encoder that uses them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from e4m3 import MAGNITUDES, Floats, draw, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.config.schema import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.errors import UserError
from iwm_fast.kernels import e4m3_rows
from iwm_fast.models import IWM
from iwm_fast.models.fp8 import fp8_linear, require_fp8, scaled_product

# Half a step of each dtype, relative: the error of a sum in fp32 per term, and of rounding a result.
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
HALF_OF_E4M3 = 2.0**-4  # 3 mantissa bits


@pytest.mark.parametrize("dtype", list(HALF_STEP), ids=str)
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9), width=st.integers(1, 70), out=st.integers(1, 9), sizes=st.floats(0, 12),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_the_matmul_of_the_rounded_operands(
    dtype: torch.dtype, tokens: int, width: int, out: int, sizes: float, seed: int
) -> None:
    """Up to a sum in fp32 and a rounding of the result the matmul is NumPy's, whatever the rows' scale; and NumPy's is
    no farther from the exact one than two operands that are half a step off, or half the smallest step."""
    x, weight = draw(tokens, width, seed, sizes, dtype), draw(out, width, seed + 1, sizes, dtype)
    bias = draw(1, out, seed + 2, sizes, dtype)[0]
    found = fp8_linear(x, weight, bias)
    assert found.dtype == dtype
    assert found.shape == (tokens, out)
    left, right, added = (t.double().numpy() for t in (x, weight, bias))
    expected = rounded(left) @ rounded(right).T + added
    size = np.abs(rounded(left)) @ np.abs(rounded(right)).T + np.abs(added)
    lost = (width + 1) * HALF_STEP[torch.float32] * size + HALF_STEP[dtype] * np.abs(expected)
    error = np.abs(found.double().numpy() - expected)
    assert (error <= 1.01 * lost).all()

    def off(factor: Floats) -> Floats:
        least = np.abs(factor).max(axis=1, keepdims=True, initial=0) * 2 / 448 * 2.0**-10
        error: Floats = np.maximum(HALF_OF_E4M3 * np.abs(factor), least)
        return error

    bound = off(left) @ np.abs(right).T + (np.abs(left) + off(left)) @ off(right).T
    assert (np.abs(rounded(left) @ rounded(right).T - left @ right.T) <= 1.000001 * bound).all()


def test_what_a_gpu_computes_is_the_same_matmul() -> None:
    """PyTorch's scaled matmul, which the CPU has too: bf16 rounds each result once more, after a sum in fp32."""
    x, weight = draw(33, 96, 0, 2.0, torch.bfloat16), draw(48, 96, 1, 2.0, torch.bfloat16)
    bias = draw(1, 48, 2, 2.0, torch.bfloat16)[0]
    found = scaled_product(e4m3_rows(x), e4m3_rows(weight), bias).double()
    expected = fp8_linear(x, weight, bias).double()
    size = fp8_linear(x.abs(), weight.abs(), bias.abs()).double()
    lost = 2 * HALF_STEP[torch.bfloat16] * expected.abs() + 97 * HALF_STEP[torch.float32] * size
    assert ((found - expected).abs() <= 1.01 * lost).all()


@pytest.mark.parametrize("dtype", list(HALF_STEP), ids=str)
def test_every_e4m3_number_passes_unchanged(dtype: torch.dtype) -> None:
    """448 in the row makes its scale 1, so a matmul with 1 returns the row."""
    numbers = torch.from_numpy(MAGNITUDES).to(dtype)
    rows = torch.stack([numbers, torch.full_like(numbers, 448.0), -numbers], dim=1)
    one = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
    found = fp8_linear(rows, one, torch.zeros(1, dtype=dtype))
    assert torch.equal(found[:, 0], numbers)


@pytest.mark.parametrize("dtype", list(HALF_STEP), ids=str)
def test_zeros_and_numbers_too_small_for_a_scale_give_the_bias(dtype: torch.dtype) -> None:
    bias = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    weight = torch.ones(3, 4, dtype=dtype)
    for value in (0.0, 1e-41):
        x = torch.full((2, 4), value).to(dtype)
        assert torch.equal(fp8_linear(x, weight, bias), bias.expand(2, 3))
        assert torch.equal(fp8_linear(weight, x, bias[:2]), bias[:2].expand(3, 2))


@pytest.mark.parametrize("dtype", list(HALF_STEP), ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_in_its_own_row(dtype: torch.dtype, value: float) -> None:
    """e4m3 has no infinity, and PyTorch's conversion turns it into 448."""
    x, weight, bias = torch.ones(3, 5, dtype=dtype), torch.ones(4, 5, dtype=dtype), torch.zeros(4, dtype=dtype)
    bad = x.clone()
    bad[1, 2] = value
    found = fp8_linear(bad, weight, bias)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], torch.full((2, 4), 5.0, dtype=dtype))
    weight[3, 0] = value
    found = fp8_linear(x, weight, bias)
    assert found[:, 3].isnan().all()
    assert found[:, :3].isfinite().all()


def test_a_gradient_is_refused() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="requires a gradient"):
        fp8_linear(x, weight, torch.zeros(4))
    with torch.no_grad():
        fp8_linear(x, weight, torch.zeros(4))


def configure(precision: str) -> ModelConfig:
    """Wide enough that errors of an encoder's sums average out: 128, and four blocks."""
    return ModelConfig(
        encoder=EncoderShape(depth=4, width=128, heads=4),
        patch=4,
        image=12,
        target_precision=precision,  # type: ignore[arg-type]
        predictor=PredictorConfig(depth=2, width=32, heads=2),
    )


def make(precision: str) -> IWM:
    torch.manual_seed(0)
    return IWM(configure(precision), 3)


def test_parameters_and_their_first_values_are_those_without_fp8() -> None:
    plain, fp8 = make("train").state_dict(), make("fp8").state_dict()
    assert list(plain) == list(fp8)
    assert all(torch.equal(plain[name], fp8[name]) for name in plain)


@pytest.mark.parametrize("dtype", list(HALF_STEP), ids=str)
def test_targets_are_near_those_without_fp8_and_equal_in_evaluation(dtype: torch.dtype) -> None:
    """An operand rounded to 3 mantissa bits is off by 2.6 % RMS (half a step, 2⁻⁴, is uniform over values that are
    uniform in their logarithm); a matmul of two by 3.7 %, and so are sums of independent errors. The residual stream
    carries positions and each layer's share past them: the observed error is 2 to 3 %."""
    images = torch.randint(0, 256, (5, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain, fp8 = make("train").to(dtype), make("fp8").to(dtype)
    expected, found = plain.encode(images, "target").float(), fp8.encode(images, "target").float()
    error = float((found - expected).norm() / expected.norm())
    assert 0.005 < error < 0.05
    assert torch.equal(fp8.encode(images), plain.encode(images))
    assert torch.equal(fp8.eval().encode(images, "target").float(), expected)


def test_gradients_reach_encoder_and_predictor_and_are_near_those_without_fp8(plain: SimpleNamespace) -> None:
    """Targets that are 3 % off change a loss of the size of their variance, and its gradients, by about as much."""
    batch = plain.draw_batch(configure("fp8"), 3, [5, 1, 3, 6], [2, 4, 3, 2])
    batch.action = batch.action.float()
    exact, fp8 = make("train"), make("fp8")
    losses = []
    for model in (exact, fp8):
        loss = model(*batch.arguments()).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    for (name, one), other in zip(exact.named_parameters(), fp8.parameters(), strict=True):
        if name.startswith("target_encoder."):
            assert other.grad is None
            continue
        assert one.grad is not None, name
        assert other.grad is not None, name
        assert (other.grad - one.grad).norm() <= 0.1 * one.grad.norm() + 1e-7, name


def test_an_older_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(UserError, match=r"model\.target_precision is fp8, .* NVIDIA A100 has 8\.0: use train$"):
        require_fp8(torch.device("cuda"))
