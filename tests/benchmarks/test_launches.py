"""Launches of one call of the MLP, and its memory, counted without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from iwm_fast.benchmarks.counting.launch_counting import count_launches
from iwm_fast.benchmarks.launches import main, mlp_launches
from iwm_fast.errors import UserError
from iwm_fast.kernels import mlp_workspace, use_workspace

ROWS, WIDTH, HIDDEN, ACTIONS = 100_352, 384, 1536, 16


def total(launched):
    return launched.triton + launched.torch


def test_a_call_with_an_action_launches_few_kernels():
    found = mlp_launches(ROWS, WIDTH, HIDDEN, ACTIONS)
    assert total(found["forward"]) <= 4
    assert total(found["backward"]) <= 13
    assert found["backward"].kernels["weight_grad_kernel"] == 2


def test_a_call_without_an_action_launches_fewer():
    found = mlp_launches(50_176, 768, 3072, 0)
    assert total(found["forward"]) == 3
    assert total(found["backward"]) <= 9


def test_chunks_multiply_launches_and_bound_memory():
    whole = mlp_launches(ROWS, WIDTH, HIDDEN, ACTIONS)
    with use_workspace(2**26):
        chunked = mlp_launches(ROWS, WIDTH, HIDDEN, ACTIONS)
    for name in ("forward", "backward"):
        assert total(chunked[name]) > 3 * total(whole[name])
        assert chunked[name].peak_bytes < 0.5 * whole[name].peak_bytes


@pytest.mark.parametrize("actions", [0, ACTIONS])
@pytest.mark.parametrize("limit", [2**30, 2**27, 2**26], ids=["whole", "in chunks", "in more"])
def test_memory_is_what_the_plan_counts(limit, actions):
    """Without the result, which is the caller's, and a row of fp32 sums per image; the rest is less than 2 %."""
    result, per_image = ROWS * WIDTH * 2, 512 * HIDDEN * 4 if actions else 0
    for name, launched in mlp_launches(ROWS, WIDTH, HIDDEN, actions, limit).items():
        backward = name == "backward"
        planned = mlp_workspace(ROWS, WIDTH, HIDDEN, 2, backward=backward, image=actions > 0, workspace=limit)
        rest = launched.peak_bytes - result - planned
        assert 0 <= rest <= 0.02 * launched.peak_bytes + (per_image if backward else 0), name


def test_pytorch_s_kernels_count_and_views_and_allocations_do_not():
    def work():
        x = torch.empty(8, 4, device="meta")
        y = x.t()[1:].reshape(-1)  # a copy: one
        torch.empty_like(y, dtype=torch.float64).copy_(y)  # converted: two
        x.add_(1)  # three
        torch.zeros(3, device="meta")  # four
        torch.mm(x, x.t())  # five

    found = count_launches(work)
    assert (found.triton, found.torch) == (0, 5)


def test_the_program_writes_both_directions(tmp_path, monkeypatch):
    main(["--mlp", "1000,64,128,4", "--json", str(tmp_path / "found.json")])
    document = json.loads((tmp_path / "found.json").read_text())
    for name in ("forward", "backward"):
        assert {"triton", "torch"} <= document[name].keys()
        assert document[name]["triton"] > 0


@pytest.mark.parametrize("words", ["1,2,3", "1,2,3,x", "0,2,3,4", "1,2,3,-4"])
def test_sizes_that_are_none_are_refused(words, tmp_path):
    with pytest.raises(UserError, match="N,D,H,A"):
        main([f"--mlp={words}", "--json", str(tmp_path / "found.json")])
