"""Autocast around an operator does what its docstring says and nothing else, forward and backward."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, check_autocast, check_compiled_autocast

from iwm_fast.config.schema import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.kernels import conditioned_mlp, stopgrad_l2
from iwm_fast.models import IWM, Segments


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_cast_by_the_rule_and_nothing_else_changes(name: str) -> None:
    check_autocast(name, "cpu", "reference")


@pytest.mark.parametrize("name", ["conditioned_mlp", "residual_norm"])
def test_compiled_under_autocast_it_is_the_same(name: str) -> None:
    check_compiled_autocast(name, "cpu", "reference")


def test_a_loss_takes_its_two_types_to_the_wider_one_under_autocast_only() -> None:
    """Autocast gives matmuls in half and normalisations in fp32: prediction and target."""
    pred, target = torch.randn(4, 3).bfloat16().requires_grad_(), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stopgrad_l2(pred, target)
    assert torch.equal(loss, stopgrad_l2(pred.float(), target))
    loss.backward()
    assert pred.grad is not None
    assert pred.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"target is torch\.float32"):
        stopgrad_l2(pred, target)


def test_a_failing_backward_pass_leaves_autocast_as_it_was() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (5,), (4, 5), (4,))]
    out = conditioned_mlp(x, *weights, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        out.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", ["vit", "mlp"])
def test_a_model_steps_under_autocast(kind: str) -> None:
    """As in a user's own training loop: within bf16's rounding of fp32, and with fp32 gradients."""
    torch.manual_seed(0)
    predictor = PredictorConfig(kind=kind, depth=2, width=16, heads=2, conditioning="block")
    shape = EncoderShape(depth=2, width=16, heads=2)
    model = IWM(ModelConfig(encoder=shape, image=16, patch=4, predictor=predictor), 3)
    images = torch.randint(0, 256, (2, 2, 16, 16, 3), dtype=torch.uint8)
    seen, asked = torch.tensor([0, 3, 5, 8, 9]), torch.tensor([1, 2, 4, 7, 10])
    segments = Segments.from_lengths([3, 2])
    batch = (*images, torch.randn(2, 3), seen, segments, seen if kind == "mlp" else asked, segments)
    plain = model(*batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=3e-2, atol=0)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
