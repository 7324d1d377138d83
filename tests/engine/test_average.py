"""The target's EMA on two ranks: fp32 and sharded, sent once per step beside other work, exact."""

import json
import math

import pytest
import torch
from launched import on_ranks
from small_run import metrics, small_config, state

from iwm_fast.actions.space import ActionSpace
from iwm_fast.models.iwm import IWM

pytestmark = pytest.mark.slow  # two ranks at three stages

STEPS = 4
CHANGES = {"train__precision": "bf16", "train__steps": STEPS, "checkpoint__every_steps": 1, "checkpoint__keep_last": 9}


@pytest.fixture(scope="module")
def runs(tiny_images, tmp_path_factory):
    """Stages 1 to 3 under bf16, with an EMA at momentum 0.9999 and without one."""
    out = tmp_path_factory.mktemp("average")
    jobs = [
        {
            "name": f"ema_{stage}",
            "record": f"ema_{stage}",
            "zero__stage": stage,
            "train__ema": [0.9999, 0.9999],
            **CHANGES,
        }
        for stage in (1, 2, 3)
    ]
    jobs += [
        {"name": f"shared_{s}", "record": f"shared_{s}", "zero__stage": s, "model__target": "shared", **CHANGES,
         "train__steps": 1}
        for s in (1, 2, 3)
    ]  # fmt: skip
    on_ranks(2, tiny_images, out, jobs)
    return out


def recorded(runs, name):
    return [json.loads((runs / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def begun(tiny_images):
    """Return the initial model of all of these runs."""
    config = small_config(tiny_images)
    torch.manual_seed(config.train.seed)
    return IWM(config.model, ActionSpace(config.actions.groups, config.actions.form).dim)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_ema_equals_a_float64_one_to_a_millionth_and_moves(stage, runs, tiny_images):
    start = dict(begun(tiny_images).encoder.named_parameters())
    steps = [state(runs / f"ema_{stage}", step) for step in range(1, STEPS + 1)]
    momenta = [record["ema_momentum"] for record in metrics(runs / f"ema_{stage}")]
    assert momenta == [0.9999] * STEPS
    for name, first in start.items():
        expected = first.detach().double()
        for momentum, weights in zip(momenta, steps, strict=True):
            expected = momentum * expected + (1 - momentum) * weights[f"weight/encoder.{name}"].double()
        found = steps[-1][f"ema/target_encoder.{name}"].double()
        assert (found - expected).norm() <= 1e-6 * expected.norm(), name
    # In bf16 the step of 1e-4 of a difference would be lost: most of the matrices' elements move.
    moved = [
        (steps[-1][f"ema/target_encoder.{n}"] != p.detach()).float().mean() for n, p in start.items() if p.ndim > 1
    ]
    assert min(moved) > 0.5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_rank_holds_more_of_the_fp32_ema_than_its_share(stage, runs, tiny_images):
    """A rank's fp32 memory with an EMA, minus that without one."""
    parameters = [p.numel() for p in begun(tiny_images).encoder.parameters()]
    for rank, (with_ema, without) in enumerate(
        zip(recorded(runs, f"ema_{stage}"), recorded(runs, f"shared_{stage}"), strict=True)
    ):
        average = with_ema["fp32_bytes"] - without["fp32_bytes"]
        # Stage 3 shards and pads each parameter; stages 1 and 2 halve the flattened groups, not the encoder.
        share = 4 * sum(math.ceil(n / 2) for n in parameters) if stage == 3 else 4 * sum(parameters)
        slack = 4096  # scalars and buffers of the loop
        assert average <= share + slack, (rank, average, share)
    total = sum(r["fp32_bytes"] for r in recorded(runs, f"ema_{stage}"))
    total -= sum(r["fp32_bytes"] for r in recorded(runs, f"shared_{stage}"))
    assert 4 * sum(parameters) * 0.95 <= total <= 4 * sum(parameters) * 1.05 + 2 * 4096


@pytest.mark.parametrize("stage", [1, 2])
def test_one_all_gather_per_step_is_under_way_when_the_step_ends(stage, runs, tiny_images):
    encoder = sum(p.numel() for p in begun(tiny_images).encoder.parameters())
    sent = [[step["gathers"] for step in rank["steps"]] for rank in recorded(runs, f"ema_{stage}")]
    assert sent[0] == sent[1]
    assert all(len(gathers) == 1 for gathers in sent[0])
    assert all(step["under_way"] for rank in recorded(runs, f"ema_{stage}") for step in rank["steps"])
    # bf16, padded to the longer rank: between half and all of the encoder.
    assert 2 * encoder / 2 <= sent[0][0][0] <= 2 * encoder


def test_stage_3_sends_nothing_extra_for_the_ema(runs):
    assert all(step["gathers"] == [] for rank in recorded(runs, "ema_3") for step in rank["steps"])
