"""LAMB against its definition, in float64."""

import torch
from torch import nn

from iwm_fast.engine.lamb import FiniteLamb
from iwm_fast.engine.optimizer import parameter_groups


def lamb(weight, grads, lr, decay, *, scaled, betas=(0.9, 0.999), eps=1e-8):
    """Algorithm 2 of arXiv:1904.00962, written out."""
    w, m, v = weight.double(), torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for t, grad in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * grad.double()
        v = betas[1] * v + (1 - betas[1]) * grad.double() ** 2
        r = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        u = r + decay * w if scaled else r
        ratio = w.norm() / u.norm() if scaled and w.norm() > 0 else 1.0
        w = w - lr * ratio * u
    return w


def test_lamb_is_its_definition_and_leaves_biases_unscaled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    nn.init.zeros_(model[1].weight)  # a tensor without a norm gets AdamW's update
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = FiniteLamb(parameter_groups(model), lr=0.02, betas=(0.9, 0.999))
    optimizer.param_groups[0]["weight_decay"] = 0.1
    grads = [{name: torch.randn_like(p) for name, p in begin.items()} for _ in range(4)]
    for step in grads:
        for name, parameter in model.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = lamb(begin[name], [g[name] for g in grads], 0.02, 0.1, scaled=parameter.ndim > 1)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = nn.Linear(3, 2)
    optimizer = FiniteLamb(parameter_groups(model), lr=0.1)
    before = model.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.step()
    assert float(optimizer.found_inf) == 1.0
    assert torch.equal(model.weight, before)
