"""ema_update on Triton against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.kernels import ema_update, ema_update_flops

# Below, at and above a program's 2,048 elements; divisible by four and not.
LENGTHS = [0, 1, 63, 64, 2047, 2048, 2049, 5000]
HALF_STEP = 2.0**-24  # of fp32, relative


def shards(lengths, seed, device, dtype=torch.float32, gap=0):
    """Parts of one buffer, as ZeRO holds them, `gap` elements before each; and the buffer."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(sum(lengths) + gap * len(lengths), generator=generator).to(device, dtype)
    ends = torch.tensor([n + gap for n in lengths]).cumsum(0).tolist()
    return [whole[end - n : end] for n, end in zip(lengths, ends, strict=True)], whole


@pytest.mark.parametrize("copied", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@settings(max_examples=15)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4),
    gaps=st.tuples(*[st.sampled_from([0, 3, 4])] * 3),
    momentum=st.sampled_from([0.0, 0.3, 0.5, 0.996, 0.9999, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_element_and_nothing_beside_them(copied, lengths, gaps, momentum, seed, device):
    """Three roundings: of 1 − momentum and the difference, of their product, and of the sum."""
    averages, held = shards(lengths, seed, device, gap=gaps[0])
    weights, read = shards(lengths, seed + 1, device, gap=gaps[1])
    copies, written = shards(lengths, seed + 2, device, copied or torch.float32, gap=gaps[2])
    before = [t.clone() for t in (held, read, written)]
    old, new = torch.cat(averages).double(), torch.cat(weights).double()
    ema_update(averages, weights, momentum, copies if copied else None, backend="triton")
    found = torch.cat(averages)
    exact = momentum * old + (1 - momentum) * new
    moved = (1 - momentum if 1 - momentum < 0.5 else 1) * (new - old).abs()
    assert ((found.double() - exact).abs() <= 1.01 * HALF_STEP * (3 * moved + exact.abs())).all()
    assert torch.equal(torch.cat(copies), found.to(copied) if copied else before[2][cells(lengths, gaps[2])])
    for whole, unchanged, gap in zip((held, read, written), before, gaps, strict=True):
        beside = torch.ones(len(whole), dtype=torch.bool)
        beside[cells(lengths, gap)] = False
        assert torch.equal(whole[beside], unchanged[beside])
    assert torch.equal(read, before[1])


def cells(lengths, gap):
    """Return the places in the buffer that belong to a shard."""
    inside = [torch.cat([torch.zeros(gap), torch.ones(n)]) for n in lengths]
    return torch.cat(inside).nonzero().squeeze(1)


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_the_flag_on_the_device_decides_whether_the_averages_move(device, flag):
    (averages, _), (weights, _), (copies, _) = (shards([100, 2049], seed, device) for seed in range(3))
    kept, moved = [t.clone() for t in averages], [t.clone() for t in averages]
    ema_update(averages, weights, 0.3, copies, unless=torch.full((), flag, device=device), backend="triton")
    ema_update(moved, weights, 0.3, backend="triton")
    for found, expected in zip(averages, kept if flag else moved, strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(copies, averages, strict=True))


def test_the_ends_are_exact(device):
    averages, weights = (shards([100, 7], seed, device)[0] for seed in (0, 1))
    kept = [t.clone() for t in averages]
    ema_update(averages, weights, 1.0, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(averages, kept, strict=True))
    ema_update(averages, weights, 0.0, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(averages, weights, strict=True))


@pytest.mark.parametrize("momentum", [0.3, 0.996])
def test_a_lerp_and_a_copy_differ_by_one_rounding_of_the_product_and_one_of_the_result(momentum, device):
    lengths = [3000, 40]
    ours, theirs = (shards(lengths, 0, device)[0] for _ in range(2))
    weights, copies = shards(lengths, 1, device)[0], shards(lengths, 2, device, torch.bfloat16)[0]
    moved = (1 - momentum if momentum > 0.5 else momentum) * (torch.cat(weights) - torch.cat(ours)).abs().double()
    ema_update(ours, weights, momentum, copies, backend="triton")
    torch._foreach_lerp_(theirs, weights, 1.0 - momentum)
    theirs = torch.cat(theirs).double()
    assert ((torch.cat(ours).double() - theirs).abs() <= 1.01 * HALF_STEP * (moved + 2 * theirs.abs())).all()


def test_other_tensors_are_never_taken_for_those_before(device):
    """The table of addresses is cached between calls."""
    for seed in range(4):
        lengths = [64, 2100]
        averages, weights = (shards(lengths, seed + k, device)[0] for k in (0, 1))
        expected = [torch.lerp(a, w, 0.25) for a, w in zip(averages, weights, strict=True)]
        ema_update(averages, weights, 0.75, backend="triton")
        for average, wanted in zip(averages, expected, strict=True):
            torch.testing.assert_close(average, wanted)


def test_a_small_step_moves_and_no_tensor_at_all_is_fine(device):
    average, weight = torch.ones(8, device=device), torch.full((8,), 1.1, device=device)
    ema_update([average], [weight], 0.9999, backend="triton")
    torch.testing.assert_close(average, torch.full((8,), 1.00001, device=device), rtol=1e-7, atol=0)
    ema_update([], [], 0.9, backend="triton")
    ema_update([average[:0]], [weight[:0]], 0.9, [average[:0].half()], backend="triton")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_silent(bad, device):
    average, weight = torch.ones(70, device=device), torch.ones(70, device=device)
    copy = torch.zeros(70, dtype=torch.bfloat16, device=device)
    weight[4] = bad
    ema_update([average], [weight], 0.996, [copy], backend="triton")
    for tensor in (average, copy):
        assert not tensor[4].isfinite()
        assert (tensor[torch.arange(70, device=device) != 4] == 1).all()


@pytest.mark.parametrize("copied", [True, False])
def test_opcheck_and_operations(copied, device):
    averages, weights = (shards([5, 64], seed, device)[0] for seed in (0, 1))
    copies = shards([5, 64], 2, device, torch.float16)[0] if copied else []
    torch.library.opcheck(torch.ops.iwm_fast.ema_update_.default, (averages, weights, copies, 0.25))
    with FlopCounterMode(display=False) as counter:
        ema_update(averages, weights, 0.75, copies, backend="triton")
    assert counter.get_total_flops() == ema_update_flops(69)
