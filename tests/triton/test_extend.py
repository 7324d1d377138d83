"""The kernel of docs/extend/kernel.md against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iwm_fast.config.plugins import load_plugins

load_plugins([str(Path(__file__).resolve().parents[2] / "examples" / "extend" / "squared_relu.py")])
from squared_relu import squared_relu, squared_relu_bytes, squared_relu_reference  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (7,), (13, 131)])
def test_value_and_gradient(dtype, shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, z = squared_relu(x, backend="triton"), squared_relu_reference(exact)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    y.backward(dy)
    z.backward(dy.double())
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), z, rtol=tolerance, atol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2 * tolerance, atol=0)


def test_the_references_gradient_is_the_derivative():
    assert torch.autograd.gradcheck(squared_relu_reference, torch.randn(11, dtype=torch.float64, requires_grad=True))


def test_bytes():
    assert squared_relu_bytes(10) == {"forward": 40, "backward": 60}
