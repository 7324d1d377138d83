"""The operators in PyTorch: registrations, compilation, checkpointing, autocast, FLOP counts, a training."""

from __future__ import annotations

import shutil

import pytest
import torch
from operators import mlp_inputs
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.config import PredictorConfig
from iwm_fast.kernels import (
    conditioned_mlp,
    conditioned_mlp_flops,
    stopgrad_l2,
    stopgrad_l2_flops,
    use_backend,
)
from iwm_fast.models.blocks import Block
from iwm_fast.models.packing import Segments
from iwm_fast.models.predictors import MlpPredictor

NAMES = ("x", "w_in", "b_in", "w_out", "b_out", "action", "w_action", "cu_seqlens", "norm_weight", "norm_bias")


@pytest.mark.parametrize("options", [{}, {"actions": None}, {"norm": False}], ids=["all", "no action", "no norm"])
def test_opcheck_of_the_mlp(options, device):
    case = mlp_inputs([7, 0, 12], width=24, hidden=40, device=device, **options)
    inputs = tuple(case.get(name) for name in NAMES)
    torch.library.opcheck(torch.ops.iwm_fast.conditioned_mlp.default, (*inputs, True, 1e-6, "gelu", 2**30))
    detached = tuple(None if t is None else t.detach() for t in inputs)
    grad = torch.randn(19, 24, device=device)
    for weights in (True, False):
        options = (True, 1e-6, "gelu", 2**30, weights)
        torch.library.opcheck(torch.ops.iwm_fast.conditioned_mlp_backward.default, (grad, *detached, *options))


@pytest.mark.parametrize("with_grad", [True, False])
def test_opcheck_of_the_loss(with_grad, device):
    pred = torch.randn(9, 16, device=device, requires_grad=with_grad)
    target, index = torch.randn(5, 16, device=device), torch.tensor([0, 4, 2, 2, 1, 3, 0, 0, 4], device=device)
    torch.library.opcheck(torch.ops.iwm_fast.stopgrad_l2.default, (pred, target, index, True, 0.25, 1e-6, with_grad))
    saved = (torch.tensor(2.0, device=device), pred.detach(), target, index, True, 0.25, 1e-6)
    torch.library.opcheck(torch.ops.iwm_fast.stopgrad_l2_backward.default, saved)
    torch.library.opcheck(torch.ops.iwm_fast.stopgrad_l2_scale_.default, (torch.zeros(9, 16, device=device), *saved))


def block_and_inputs(device, conditioned=True):
    torch.manual_seed(0)
    block = Block(24, 2, 2.0, "sdpa", 3 if conditioned else 0).to(device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(20, 24, device=device, requires_grad=True)
    return block, x, Segments.from_lengths((8, 12), device), torch.randn(2, 3, device=device)


NO_COMPILER = shutil.which("g++") is None and not torch.cuda.is_available()
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(NO_COMPILER, reason="needs a C++ compiler"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_predictor_block_and_its_loss_compile_into_one_graph(backend, device, tmp_path, monkeypatch):
    # Not what another version of the operators left in the user's cache.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    block, x, segments, action = block_and_inputs(device)
    target = torch.randn(20, 24, device=device)

    def step(x):
        mlp = block.mlp(x, segments.cu_seqlens, action)
        return stopgrad_l2(mlp, target, normalize_target=True, backend="triton")

    with use_backend("triton"):
        expected = torch.autograd.grad(step(x), (x, *block.mlp.parameters()))
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        found = torch.autograd.grad(compiled(x), (x, *block.mlp.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_recomputes_to_the_same_bits(device):
    block, x, segments, action = block_and_inputs(device)
    parameters = (x, *block.parameters())
    with use_backend("triton"):
        plain = torch.autograd.grad(block(x, segments, action).square().sum(), parameters)
        again = checkpoint(block, x, segments, action, use_reentrant=False)
        found = torch.autograd.grad(again.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_autocast_computes_in_its_type(device):
    block, x, segments, action = block_and_inputs(device)
    with use_backend("triton"), torch.autocast(device, torch.bfloat16):
        out = block.mlp(x, segments.cu_seqlens, action)
    assert out.dtype == torch.bfloat16
    plain = block.mlp(x, segments.cu_seqlens, action)
    assert (out.float() - plain).norm() <= 0.02 * plain.norm()
    out.sum().backward()
    assert block.mlp.w_in.grad.dtype == torch.float32


def test_operations_are_counted_by_formula(device):
    case = mlp_inputs([9, 12], width=24, hidden=40, actions=5, device=device)
    with FlopCounterMode(display=False) as counter:
        conditioned_mlp(**case, backend="triton").sum().backward()
    sizes = {"tokens": 21, "width": 24, "hidden": 40, "out": 24, "images": 2, "actions": 5}
    forward, backward = conditioned_mlp_flops(**sizes), conditioned_mlp_flops(**sizes, backward=True)
    assert counter.get_total_flops() == forward + backward
    pred = torch.randn(6, 8, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        stopgrad_l2(pred, torch.randn(6, 8, device=device), normalize_target=True, backend="triton").backward()
    assert counter.get_total_flops() == stopgrad_l2_flops(6, 8, normalize_target=True)


def train(backend, device, steps):
    """Return losses of a predictor that learns a fixed linear map of tokens, with the shift as its action."""
    torch.manual_seed(0)
    config = PredictorConfig(kind="mlp", depth=1, width=16, heads=2, conditioning="block")
    predictor = MlpPredictor(config, 16, 16).to(device)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=2e-3)
    teacher = torch.randn(16, 16, device=device)
    segments = Segments.from_lengths((20, 0, 28), device)
    found = []
    with use_backend(backend):
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            z = torch.randn(48, 16, generator=generator).to(device)
            action = torch.randn(3, 16, generator=generator).to(device)
            target = z @ teacher + action.index_select(0, segments.image_of_token)
            loss = stopgrad_l2(predictor(z, segments, action), target, normalize_target=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_a_training_follows_the_reference(steps, device):
    """fp32 differs in its last bits from the first step, and AdamW carries that along: 1e-4 of every loss."""
    ours, theirs = (train(backend, device, steps) for backend in ("triton", "reference"))
    assert theirs[-1] < 0.5 * theirs[0]
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    assert worst <= 1e-4
