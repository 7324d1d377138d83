"""Launch counts of PyTorch's operators on CUDA, against counts of ATen's own launches (tools/nullgpu)."""

from __future__ import annotations

import pytest
import torch

from iwm_fast.benchmarks.cases.presets import preset_config
from iwm_fast.benchmarks.counting.launch_counting import count_launches
from iwm_fast.benchmarks.counting.launch_rules import multi_tensor_launches
from iwm_fast.cost.memory import layout_of


def launched(work):
    return count_launches(work).torch


def empty(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


@pytest.mark.parametrize(
    ("elements", "lists", "expected"),
    [
        ([], 1, 0),
        ([0, 0], 1, 0),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 36, 4, 1),
        ([1] * 37, 4, 2),
        ([65_536 * 320], 1, 1),
        ([65_536 * 320 + 1], 1, 2),
        ([65_536 * 319, 65_536 * 2], 2, 2),  # a tensor that two launches share
    ],
)
def test_tensors_and_chunks_fill_launches(elements, lists, expected):
    assert multi_tensor_launches(elements, lists) == expected


def test_scalars_of_their_own_leave_room_for_fewer_tensors():
    assert multi_tensor_launches([1] * 97, 1, scalars=True) == 2


@pytest.mark.parametrize(("preset", "expected"), [("gpu-base", (7, 7, 8)), ("gpu-small", (3, 6, 4))])
def test_the_presets_weights_take_the_launches_that_the_null_gpu_counted(preset, expected):
    """The fused AdamW over decayed weights and over the others, and the norms of all."""
    trained = layout_of(preset_config(preset)).trained
    decayed, plain = ([p.size for p in trained if p.decayed is wanted] for wanted in (True, False))
    found = multi_tensor_launches(decayed, 4), multi_tensor_launches(plain, 4)
    assert (*found, multi_tensor_launches([*decayed, *plain], 1)) == expected


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        (lambda x: x.clone(), 0),
        (lambda x: x[::2].clone(), 1),
        (lambda x: x.t().contiguous(), 1),
        (lambda x: x.to(torch.bfloat16), 1),
        (lambda x: torch.empty_like(x).copy_(x), 0),
        (lambda x: empty(4, 8).copy_(x.t()), 1),
        (lambda x: x.copy_(torch.zeros(8, 4)), 1),  # zeros on the host; the upload is no launch
        (lambda x: x[:0].clone(), 0),
    ],
    ids=["whole", "strided", "transposed", "converted", "into", "into another layout", "from the host", "nothing"],
)
def test_a_copy_that_only_moves_bytes_launches_nothing(copy, expected):
    x = empty(8, 4)
    assert launched(lambda: copy(x)) == expected


@pytest.mark.parametrize(("tensors", "expected"), [(1, 1), (128, 1), (129, 2), (378, 3)])
def test_concatenation_takes_128_tensors_a_launch(tensors, expected):
    parts = [empty(2)] * tensors
    assert launched(lambda: torch.cat(parts)) == expected
    assert launched(lambda: torch.stack(parts)) == expected


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x: torch._foreach_add_(x, 1.0), 2),
        (lambda x: torch._foreach_mul(x, 2.0), 2),
        (lambda x: torch._foreach_lerp_(x, x, 0.5), 2),
        (lambda x: torch._foreach_addcmul(x, x, x), 4),
        (torch._foreach_norm, 4),  # clear the partial results, two launches, add them
    ],
    ids=["in place", "into new tensors", "two lists", "four lists", "norms"],
)
def test_lists_of_tensors_launch_by_chunks(work, expected):
    tensors = [empty(3) for _ in range(111)]
    assert launched(lambda: work(tensors)) == expected


def test_a_layer_norm_s_gradient_takes_two_launches():
    x = empty(8, 4, requires_grad=True)
    weight, bias = (empty(4, requires_grad=True) for _ in range(2))
    out = torch.nn.functional.layer_norm(x, (4,), weight, bias)
    grad = empty(8, 4)
    assert launched(lambda: out.backward(grad)) == 2
