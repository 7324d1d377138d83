"""Every packed attention on this machine: its results and gradients, and which of them repeat bit for bit."""

from __future__ import annotations

import pytest
import torch

from iwm_fast.models.attention import BACKENDS, choose_backend, describe_attention, packed_attention, unavailable
from iwm_fast.models.packing import Segments
from iwm_fast.models.xformers_operators import dispatched

LENGTHS = {"ragged": (5, 17, 1, 33), "equal": (64,) * 3, "with an empty one": (7, 0, 9), "long": (196, 180, 33)}
GPU = torch.device("cuda", 0)


def drawn(tokens, heads=2, head=64):
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, 3, heads, head, device=GPU, dtype=torch.bfloat16)
    return [part.requires_grad_() for part in qkv.unbind(1)], torch.randn_like(qkv[:, 0])


def results(parts, upstream, segments, backend):
    out = packed_attention(*parts, segments, backend)
    return [out.detach(), *torch.autograd.grad(out, parts, upstream)]


def moved(parts, dtype):
    return [part.detach().to("cpu", dtype).requires_grad_() for part in parts]


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = unavailable(request.param, "cuda")
    if reason is not None:
        pytest.skip(f"{request.param} {reason}")
    return request.param


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_results_and_gradients_are_each_images_own(backend, lengths):
    parts, upstream = drawn(sum(lengths))
    found = results(parts, upstream, Segments.from_lengths(lengths, GPU), backend)
    on_host = Segments.from_lengths(lengths)
    exact = results(moved(parts, torch.float64), upstream.double().cpu(), on_host, "sdpa")
    plain = results(moved(parts, torch.bfloat16), upstream.cpu(), on_host, "sdpa")
    for ours, right, rounded in zip(found, exact, plain, strict=True):
        # Scores and their gradients are bf16 operands of the second matmul; the CPU has them in fp32.
        assert (ours.double().cpu() - right).norm() <= 2 * (rounded.double() - right).norm() + 1e-2 * right.norm()


def test_with_determinism_gradients_repeat_bit_for_bit(backend, monkeypatch):
    if backend == "cudnn":
        pytest.skip("cuDNN's backward pass has no deterministic form in PyTorch")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    lengths = (196, 64, 33, 1, 180) * 40
    parts, upstream = drawn(sum(lengths), heads=12)
    segments = Segments.from_lengths(lengths, GPU)
    torch.use_deterministic_algorithms(True)
    try:
        first = results(parts, upstream, segments, backend)
        for _ in range(5):
            assert all(map(torch.equal, first, results(parts, upstream, segments, backend)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_xformers_dispatches_to_and_what_auto_is_are_said():
    assert "fa" in dispatched(GPU) or "cutlass" in dispatched(GPU)
    assert describe_attention("auto", GPU).startswith(("xformers", "sdpa"))
    segments = Segments.from_lengths(LENGTHS["long"], GPU)
    assert choose_backend("auto", GPU, segments, 12, 64, torch.bfloat16, gradients=True) in BACKENDS
