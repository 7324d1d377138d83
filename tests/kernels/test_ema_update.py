"""ema_update on the CPU: against a float64 evaluation written out, and bit for bit against torch's two operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.kernels import ema_update, ema_update_bytes, ema_update_flops


def draw(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in lengths]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=4), momentum=st.floats(0, 1), copied=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_one_element_after_another_in_float64(lengths: list[int], momentum: float, copied: bool, seed: int) -> None:
    averages, weights = draw(lengths, seed), draw(lengths, seed + 1)
    copies = draw(lengths, seed + 2, torch.bfloat16) if copied else None
    pairs = list(zip(averages, weights, strict=True))
    expected = [[momentum * float(a) + (1 - momentum) * float(w) for a, w in zip(*p, strict=True)] for p in pairs]
    kept = [w.clone() for w in weights]
    ema_update(averages, weights, momentum, copies)
    for average, wanted in zip(averages, expected, strict=True):
        torch.testing.assert_close(average, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))
    for copy, average in zip(copies or [], averages, strict=False):
        assert torch.equal(copy, average.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_step_leaves_the_averages_and_copies_them(dtype: torch.dtype) -> None:
    averages, weights, copies = (draw([1, 31, 1000], seed, dtype) for seed in range(3))
    kept = [a.clone() for a in averages]
    moved = [a.clone() for a in averages]
    ema_update(averages, weights, 0.3, copies, unless=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(averages, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, kept, strict=True))
    ema_update(averages, weights, 0.3, copies, unless=torch.zeros(()))
    ema_update(moved, weights, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(averages, moved, strict=True))


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros((), dtype=torch.bool)], ids=["two", "bool"])
def test_the_flag_is_one_number_in_fp32(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"it must be one torch\.float32 on cpu"):
        ema_update([torch.zeros(3)], [torch.ones(3)], 0.5, unless=wrong)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 0.9999, 1.0])
def test_fp32_is_what_a_lerp_and_a_copy_give_to_the_bit(momentum: float) -> None:
    lengths = [1, 31, 1000]
    averages, weights = draw(lengths, 0, torch.float32), draw(lengths, 1, torch.float32)
    copies = draw(lengths, 2, torch.float16)
    expected = [torch.lerp(a, w, 1.0 - momentum) for a, w in zip(averages, weights, strict=True)]
    ema_update(averages, weights, momentum, copies)
    assert all(torch.equal(a, b) for a, b in zip(averages, expected, strict=True))
    assert all(torch.equal(a, b.half()) for a, b in zip(copies, expected, strict=True))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


REFUSED = {
    "momentum": ({"momentum": 1.5}, "momentum is 1.5"),
    "not a number": ({"momentum": float("nan")}, "momentum is nan"),
    "too few weights": ({"weights": [tensor(4)]}, "there are 1 weights and 2 averages"),
    "too many copies": ({"copies": [tensor(4)] * 3}, "there are 3 copies and 2 averages"),
    "half averages": ({"averages": [tensor(4, dtype=torch.bfloat16)] * 2}, r"averages\[0\] is torch.bfloat16"),
    "mixed averages": ({"averages": [tensor(4), tensor(4, dtype=torch.float64)]}, r"averages\[1\] is torch.float64"),
    "weights' type": ({"weights": [tensor(4), tensor(4).half()]}, r"weights\[1\] is torch.float16"),
    "weights' length": ({"weights": [tensor(4), tensor(5)]}, r"weights\[1\] has shape \(5,\)"),
    "not contiguous": ({"weights": [tensor(4), tensor(8)[::2]]}, r"weights\[1\] has shape .* strides \(2,\)"),
    "copies' type": ({"copies": [tensor(4, dtype=torch.int64)] * 2}, r"copies\[0\] is torch.int64"),
    "mixed copies": ({"copies": [tensor(4), tensor(4).half()]}, r"copies\[1\] is torch.float16"),
    "triton in float64": (
        {name: [tensor(4, dtype=torch.float64) for _ in range(2)] for name in ("averages", "weights")}
        | {"backend": "triton"},
        r"averages\[0\] is torch.float64; backend .triton. needs",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"averages": [tensor(4), tensor(2, 2)], "weights": [tensor(4), tensor(4)], "momentum": 0.5}
    with pytest.raises(ValueError, match=message):
        ema_update(**(given | change))


WHOLE = torch.zeros(9)
SHARED = {
    "twice": ({"averages": [WHOLE[:4]] * 2}, r"averages\[1\] shares memory with averages\[0\]"),
    "overlapping": ({"averages": [WHOLE[2:6], WHOLE[:4]]}, r"averages\[0\] shares memory with averages\[1\]"),
    "shifted weight": (
        {"averages": [tensor(4), WHOLE[:4]], "weights": [tensor(4), WHOLE[1:5]]},
        r"weights\[1\] shares memory with averages\[1\]",
    ),
    "another's weight": (
        {"averages": [WHOLE[:4], tensor(4)], "weights": [tensor(4), WHOLE[:4]]},
        r"shares memory with .*\[.\]; a tensor that is written",
    ),
    "copies": ({"copies": [WHOLE[:4], WHOLE[3:7]]}, r"copies\[1\] shares memory with copies\[0\]"),
    "copy of another average": (
        {"averages": [WHOLE[:4], WHOLE[4:8]], "copies": [WHOLE[4:8], tensor(4)]}, "shares memory with",
    ),
    "negated average": ({"averages": [tensor(4), torch._neg_view(tensor(4))]}, r"averages\[1\] is a view of negated"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), SHARED.values(), ids=SHARED.keys())
def test_what_is_written_shares_no_memory(change: dict[str, Any], message: str) -> None:
    """Programs write in any order, and floats are read in place."""
    given = {name: [tensor(4), tensor(4)] for name in ("averages", "weights", "copies")}
    with pytest.raises(ValueError, match=message):
        ema_update(**(given | change), momentum=0.5)


def test_an_average_may_be_its_own_copy_and_two_weights_one() -> None:
    averages, weight = [tensor(4), tensor(4)], torch.ones(4)
    ema_update(averages, [weight, weight], 0.5, averages)
    assert all(torch.equal(average, torch.full((4,), 0.5)) for average in averages)


def test_no_graph_is_recorded() -> None:
    average, weight = tensor(4).requires_grad_(), torch.ones(4, requires_grad=True)
    ema_update([average], [weight], 0.5)
    assert average.grad_fn is None
    assert torch.equal(average.detach(), torch.full((4,), 0.5))


def test_counts_by_hand() -> None:
    assert ema_update_bytes(10) == 140
    assert ema_update_bytes(10, copy=0) == 120
    assert ema_update_flops(10) == 30
