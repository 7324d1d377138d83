"""fp8 matmuls on a GPU against the CPU's over the same values, which tests/models/test_fp8.py checks."""

import math

import pytest
import torch
from e4m3 import draw
from small_run import losses, small_config

from iwm_fast.config.schema import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.engine import pretrain
from iwm_fast.models import IWM
from iwm_fast.models.fp8 import fp8_linear, require_fp8


@pytest.fixture(autouse=True)
def _needs_fp8():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of capability 8.9 or later")
    require_fp8(torch.device("cuda"))


@pytest.mark.parametrize(("tokens", "width", "out"), [(197, 768, 2304), (1, 768, 768), (1003, 3072, 768), (0, 64, 32)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_matmul_is_the_cpus(tokens, width, out, activation):
    """Up to one more rounding to bf16, another order of sums and, for GELU, roundings changed by another erf."""
    x, weight = (draw(n, width, n, 1.0, torch.bfloat16) for n in (tokens, out))
    bias = draw(1, out, 2, 1.0, torch.bfloat16)[0]
    found = fp8_linear(x.cuda(), weight.cuda(), bias.cuda(), activation).cpu()
    expected = fp8_linear(x, weight, bias, activation)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    least = 0.01 if activation == "gelu" else 2.0**-8
    assert (found.double() - expected.double()).norm() <= least * expected.double().norm()


def test_what_is_not_finite_stays_so_in_its_own_row():
    x, weight = (torch.ones(n, 32, dtype=torch.bfloat16, device="cuda") for n in (7, 16))
    x[1, 2], x[3, 4], x[5, 6] = math.nan, math.inf, -math.inf
    found = fp8_linear(x, weight, weight[:, 0].contiguous())
    assert found[1::2].isnan().all()
    assert torch.equal(found[::2], torch.full_like(found[::2], 33.0))


def test_sizes_that_fp8_matmuls_do_not_support_stay_in_bf16():
    x, weight = (draw(n, 40, n, 0.0, torch.bfloat16).cuda() for n in (9, 24))
    bias = torch.zeros(24, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(fp8_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_targets_are_the_cpus():
    """Another order of sums changes some roundings to bf16, and those change some to e4m3."""
    torch.manual_seed(0)
    shape, predictor = EncoderShape(depth=4, width=128, heads=4), PredictorConfig(depth=1, width=32, heads=1)
    model = IWM(
        ModelConfig(encoder=shape, patch=4, image=12, target_precision="fp8", predictor=predictor), 3
    ).bfloat16()
    images = torch.randint(0, 256, (5, 12, 12, 3), dtype=torch.uint8)
    expected = model.encode(images, "target").double()
    own = model.eval().encode(images, "target").double()
    found = model.train().cuda().encode(images.cuda(), "target").double().cpu()
    assert (found - expected).norm() <= 0.75 * (expected - own).norm()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_follows_the_one_without(tiny_images, tmp_path, stage):
    same = {"train__steps": 6, "train__precision": "bf16", "zero__stage": stage}
    pretrain(small_config(tiny_images, **same), tmp_path / "plain")
    pretrain(small_config(tiny_images, **same, model__target_precision="fp8"), tmp_path / "fp8")
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "plain"), rel=0.05)
