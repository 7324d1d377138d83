"""The optimizer's step on the device: norm, clipping and AdamW against float64, and steps that are not finite."""

import deepspeed
import pytest
import torch
from poisoned import poison
from small_run import metrics, small_config, state
from torch import nn

from iwm_fast.engine import pretrain
from iwm_fast.engine.bf16 import Bf16Compute
from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.lamb import FiniteLamb
from iwm_fast.engine.muon import FiniteMuon
from iwm_fast.engine.optimizer import MOMENTS, FiniteAdamW
from iwm_fast.errors import UserError

SIZES = [(3,), (7, 5), (131, 513), (1,)]  # the third is summed in rows of 1024 and a remainder


def made(kind, **options):
    torch.manual_seed(0)
    model = nn.Module()
    for i, size in enumerate(SIZES):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(size)))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "decayed": True, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "decayed": False, "weight_decay": 0.0},
    ]
    optimizer = kind(groups, lr=0.01, betas=(0.9, 0.95), **options)
    return model, optimizer


def give(model, grads):
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.clone()


def random_grads(count, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [[scale * torch.randn(size, generator=generator) for size in SIZES] for _ in range(count)]


def adamw(weight, grads, decay, lr=0.01, betas=(0.9, 0.95), eps=1e-8):
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    w, m, v = weight.double(), torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for t, grad in enumerate(grads, 1):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        w = w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6], ids=["not clipped", "clipped", "clipped by none"])
@pytest.mark.parametrize("copies", [1, 4])
def test_norm_clipping_and_adamw_are_their_definitions_in_float64(clip, copies):
    model, optimizer = made(FiniteAdamW, clip=clip, fused=True)
    optimizer.copies = copies
    begin, steps = [p.detach().clone() for p in model.parameters()], random_grads(3)
    expected_grads = []
    for grads in steps:
        give(model, grads)
        optimizer.step()
        mean = [grad.double() / copies for grad in grads]
        norm = torch.cat([grad.flatten() for grad in mean]).norm()
        assert float(optimizer._global_grad_norm) == pytest.approx(float(norm), rel=1e-6)
        assert float(optimizer.found_inf) == 0.0
        factor = min(1.0, clip / float(norm + 1e-6)) if clip else 1.0
        expected_grads.append([grad * factor for grad in mean])
    for i, parameter in enumerate(model.parameters()):
        expected = adamw(begin[i], [grads[i] for grads in expected_grads], 0.1 if parameter.ndim > 1 else 0.0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_the_norm_of_three_million_elements_is_right_to_a_millionth():
    weight = nn.Parameter(torch.zeros(3_000_001))
    weight.grad = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) * 1e-3
    optimizer = FiniteAdamW([weight], lr=0.0)
    optimizer.step()
    assert float(optimizer._global_grad_norm) == pytest.approx(float(weight.grad.double().norm()), rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e30], ids=["inf", "-inf", "nan", "square"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", [FiniteAdamW, FiniteLamb, FiniteMuon])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(kind, clip, bad):
    """1e30 is finite; its square is not in float32, and the norm is infinite."""
    (ours, skipping), (theirs, plain) = made(kind, clip=clip), made(kind, clip=clip)
    first, second, third = random_grads(3)
    for grads in (first, second, third):
        for model, optimizer in ((ours, skipping), (theirs, plain)):
            give(model, grads)
            optimizer.step()
        broken = [torch.where(torch.arange(g.numel()).view(g.shape) == 0, bad, g) for g in grads]
        give(ours, broken)
        skipping.step()
        assert float(skipping.found_inf) == 1.0
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
            assert all(torch.equal(skipping.state[a][key], plain.state[b][key]) for key in (*MOMENTS, "step"))


@pytest.mark.parametrize("kind", [FiniteAdamW, FiniteLamb, FiniteMuon])
def test_a_first_step_that_is_not_finite_moves_nothing(kind):
    model, optimizer = made(kind, clip=1.0)
    begin = [p.detach().clone() for p in model.parameters()]
    give(model, [torch.full(size, float("nan")) for size in SIZES])
    optimizer.step()
    for parameter, before in zip(model.parameters(), begin, strict=True):
        assert torch.equal(parameter, before)
        assert not any(optimizer.state[parameter][key].any() for key in (*MOMENTS, "step"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_skipped_steps_are_reported_at_the_next_logged_one_and_change_nothing(
    stage, tiny_images, tmp_path, monkeypatch
):
    changes = {"zero__stage": stage, "train__precision": "bf16", "train__micro_batch": 4, "train__steps": 6,
               "checkpoint__every_steps": 1, "checkpoint__keep_last": 9, "train__clip": 1.0}  # fmt: skip
    poison(monkeypatch, {4, 5}, float("inf"))
    pretrain(small_config(tiny_images, log__every_steps=5, **changes), tmp_path / "run")
    told = {record["step"]: record["skipped_in_a_row"] for record in metrics(tmp_path / "run")}
    assert told == {1: 0, 5: 2, 6: 0}
    before, after, later = (state(tmp_path / "run", step) for step in (3, 5, 6))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(later[key], after[key]) for key in after)
    updates = [checkpoint.Checkpoint(tmp_path / f"run/checkpoints/step_{step:06d}").updates for step in (3, 5, 6)]
    assert updates == [3, 3, 4]


def test_too_many_skipped_steps_between_two_logged_ones_end_the_run(tiny_images, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4}, float("inf"))
    with pytest.raises(UserError, match="step 4: loss or gradient not finite in 3 steps in a row"):
        pretrain(small_config(tiny_images, train__max_skipped=2, log__every_steps=6), tmp_path / "run")
    assert (tmp_path / "run/skipped_steps.json").exists()


def test_a_deepspeed_that_the_step_is_not_written_for_is_refused(tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1")
    with pytest.raises(UserError, match=r"deepspeed is 0\.20\.1; zero\.stage 1 and 2 .* set zero\.stage to 0 or 3"):
        pretrain(small_config(tiny_images, zero__stage=1), tmp_path / "run")


def test_bf16_compute_rounds_all_weights_and_returns_fp32_gradients_to_the_trained_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    x = torch.randn(4, 5, dtype=torch.bfloat16)
    out = Bf16Compute(model)(x)
    out.float().square().sum().backward()
    rounded = {name: p.detach().bfloat16().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.func.functional_call(model, rounded, (x,))
    expected.float().square().sum().backward()
    assert torch.equal(out, expected)
    for name, parameter in model.named_parameters():
        if name == "0.bias":
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, rounded[name].grad.float()), name
