"""The kernels on a GPU at training's sizes, and beyond 2³¹ elements; tests/triton has everything smaller."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operators import cast, distances, mlp_inputs, outcome

from iwm_fast.kernels import conditioned_mlp, ema_update, patchify, predictor_input, residual_norm, stopgrad_l2

ROOT = Path(__file__).resolve().parents[2]
PAST_INT32 = 2**31 + 2**20


def test_all_that_the_interpreter_passes():
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "tests/triton"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_sizes_are_as_accurate_as_eager(width, dtype):
    case = mlp_inputs([197] * 40 + [0, 3], width=width, hidden=4 * width, actions=16, dtype=dtype, device="cuda")
    upstream = torch.randn_like(case["x"])
    exact = outcome(cast(case, torch.float64), upstream, backend="reference")
    ours = distances(outcome(case, upstream, backend="triton"), exact)
    eager = distances(outcome(case, upstream, backend="reference"), exact)
    for name, error in ours.items():
        assert error <= max(1.5 * eager[name], torch.finfo(dtype).eps / 2), (name, error, eager[name])


def test_the_mlp_past_two_to_the_31_elements():
    width = 128
    rows = PAST_INT32 // width
    case = mlp_inputs([0], width=width, hidden=64, actions=None, dtype=torch.bfloat16, device="cuda")
    case["x"] = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
    case = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in case.items()}
    out = conditioned_mlp(**case, backend="triton")
    for part in (slice(0, 100), slice(rows - 100, rows)):
        expected = conditioned_mlp(**(case | {"x": case["x"][part]}), backend="reference")
        assert (out[part].float() - expected.float()).norm() <= 0.01 * expected.float().norm()


def test_the_loss_past_two_to_the_31_elements():
    width = 256
    rows = PAST_INT32 // width
    pred = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    target = torch.randn(1000, width, dtype=torch.bfloat16, device="cuda")
    index = torch.randint(0, 1000, (rows,), device="cuda")
    (grad,) = torch.autograd.grad(stopgrad_l2(pred, target, index=index, reduction="sum", backend="triton"), pred)
    tail = slice(rows - 100, rows)
    expected = 2 * (pred[tail].float() - target[index[tail]].float())
    assert (grad[tail].float() - expected).norm() <= 0.01 * expected.norm()


def test_the_residual_stream_past_two_to_the_31_elements():
    width = 256
    rows = PAST_INT32 // width
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight, bias = torch.randn(2, width, dtype=torch.bfloat16, device="cuda").unbind()
    total, normed = residual_norm(x, None, weight, bias, backend="triton")
    (grad,) = torch.autograd.grad((total, normed), x, (total.detach(), normed.detach()))
    tail = x.detach()[-100:].requires_grad_()
    expected = residual_norm(tail, None, weight, bias, backend="reference")
    (wanted,) = torch.autograd.grad(expected, tail, tuple(e.detach() for e in expected))
    for found, exact in ((normed[-100:], expected[1]), (grad[-100:], wanted)):
        assert (found.float() - exact.float()).norm() <= 0.01 * exact.float().norm()


def test_the_predictors_input_past_two_to_the_31_elements():
    width = 256
    rows = PAST_INT32 // width
    context = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    position = torch.randn(196, width, dtype=torch.bfloat16, device="cuda")
    patches = torch.randint(0, 196, (rows,), device="cuda")
    place = torch.arange(rows, device="cuda").flip(0)
    out = predictor_input(context, patches, position, place, backend="triton")
    assert torch.equal(out[:100], (context[-100:] + position[patches[-100:]]).flip(0))
    (grad,) = torch.autograd.grad(out, context, out.detach())
    assert torch.equal(grad[-100:], out[:100].flip(0))


def test_the_ema_past_two_to_the_31_elements():
    average, weight = (torch.randn(PAST_INT32, device="cuda") for _ in range(2))
    copy = torch.zeros(PAST_INT32, dtype=torch.bfloat16, device="cuda")
    parts = (slice(0, 5000), slice(2**31 - 2500, 2**31 + 2500), slice(PAST_INT32 - 5000, PAST_INT32))
    expected = [torch.lerp(average[part], weight[part], 0.25) for part in parts]
    ema_update([average], [weight], 0.75, [copy], backend="triton")
    for part, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(average[part], wanted)
        assert torch.equal(copy[part], average[part].bfloat16())


@pytest.mark.parametrize("indexed", [True, False])
def test_patches_of_images_past_two_to_the_31_levels(indexed):
    side, patch = 224, 16
    images = torch.randint(0, 256, (PAST_INT32 // (3 * side**2) + 1, side, side, 3), dtype=torch.uint8, device="cuda")
    scale, shift = torch.randn(2, 3 * patch**2, device="cuda")
    every = torch.arange(len(images) * 196, device="cuda")
    index = {"patches": every % 196, "image_of_token": every // 196} if indexed else {}
    rows = patchify(images, patch, scale / 64, shift, dtype=torch.bfloat16, backend="triton", **index)
    for part in (slice(0, 2), slice(len(images) - 2, len(images))):
        wanted = patchify(images[part], patch, scale / 64, shift, dtype=torch.bfloat16, backend="reference")
        found = rows[part.start * 196 : part.stop * 196]
        assert (found.float() - wanted.float()).norm() <= 0.01 * wanted.float().norm()
