"""Gradients sent during the backward pass: the order of events, and the results of two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from overlap_ranks import BUCKET, STEPS, WORLD, train
from small_run import small_config
from torch import nn

from iwm_fast.cost.memory import buckets_of, layout_of
from iwm_fast.engine.bf16 import Bf16Compute
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.engine.overlap import SummedGradients

TESTS = Path(__file__).parents[1]


class Alone:
    """A model of three layers, the second larger than a bucket, with sums over one rank."""

    def __init__(self, monkeypatch, *, rounded=False):
        torch.manual_seed(0)
        start(alone=True)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 64), nn.Linear(64, 2))
        self.due, self.sent = True, []
        all_reduce = dist.all_reduce

        def sending(tensor, **options):
            self.sent.append((tensor.numel(), self.layers[0].weight.grad is None))
            return all_reduce(tensor, **options)

        monkeypatch.setattr(dist, "all_reduce", sending)
        parameters = list(self.layers.parameters())
        self.sums = SummedGradients(parameters, None, lambda: self.due, 4 * 140)
        self.model = self.layers
        if rounded:
            self.model = Bf16Compute(self.layers)
            self.model.hand_over(self.sums.buckets, self.sums.made)

    def backward(self, scale=1.0, through=3):
        x = torch.ones(5, 4, dtype=torch.bfloat16 if isinstance(self.model, Bf16Compute) else torch.float32)
        out = self.model(x) if through == 3 else self.layers[0](x)
        (scale * out.float().square().sum()).backward()

    @property
    def grads(self):
        return [p.grad for p in self.layers.parameters()]


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32", "bf16"])
def test_a_bucket_is_sent_once_it_is_made_before_the_first_layer_has_a_gradient(monkeypatch, rounded):
    alone = Alone(monkeypatch, rounded=rounded)
    for _ in range(2):  # gradients set to None between
        alone.sent.clear()
        alone.backward()
        # Backwards: 2 + 128 elements; 64; 512, larger than a bucket; 8 + 32.
        assert alone.sent[0] == (130, True)
        assert [size for size, _ in alone.sent] == [130, 64, 512, 40]
        alone.sums.wait()
        assert len(alone.sent) == 4
        for p in alone.layers.parameters():
            p.grad = None


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("to_none", [False, True])
def test_gradients_are_autograds_over_steps_of_two_micro_batches(monkeypatch, rounded, to_none):
    alone = Alone(monkeypatch, rounded=rounded)
    reference = Bf16Compute(alone.layers) if rounded else alone.layers
    for scale in (1.0, 2.0, 0.5):
        alone.sent.clear()
        alone.due = False
        alone.backward(scale)
        assert not alone.sent
        alone.due = True
        alone.backward(3.0)
        alone.sums.wait()
        found = [grad.clone() for grad in alone.grads]
        x = torch.ones(5, 4, dtype=torch.bfloat16 if rounded else torch.float32)
        losses = [factor * reference(x).float().square().sum() for factor in (scale, 3.0)]
        each = [torch.autograd.grad(loss, list(alone.layers.parameters())) for loss in losses]
        for grad, *parts in zip(found, *each, strict=True):
            assert torch.equal(grad, parts[0] + parts[1])
        for p in alone.layers.parameters():
            p.grad = None if to_none else p.grad.zero_()


def test_parameters_without_a_gradient_are_sent_as_zeros_when_the_sums_are_waited_for(monkeypatch):
    """Another rank may have one, and waits for this message."""
    alone = Alone(monkeypatch)
    alone.backward(through=1)
    assert not alone.sent
    alone.sums.wait()
    assert [size for size, _ in alone.sent] == [130, 64, 512, 40]
    assert all(not grad.any() for grad in alone.grads[2:])
    assert alone.grads[0].any()


def test_a_gradient_that_comes_twice_before_the_sums_are_waited_for_is_refused(monkeypatch):
    alone = Alone(monkeypatch)
    alone.backward()
    with pytest.raises(RuntimeError, match="came twice"):
        alone.backward()


MICRO = {"train__micro_batch": 2}
BF16 = {"train__precision": "bf16"}
JOBS = [{"name": f"stage {s}", "zero__stage": s} for s in range(3)]
JOBS += [{"name": f"stage {s} again", "zero__stage": s} for s in range(3)]
JOBS += [{"name": f"stage {s} micro", "zero__stage": s} | MICRO for s in range(3)]
JOBS += [{"name": f"stage {s} bf16", "zero__stage": s} | BF16 | MICRO for s in range(2)]
JOBS += [{"name": "stage 0 bf16 late", "zero__stage": 0, "late": True} | BF16 | MICRO]
JOBS += [{"name": f"stage {s} graphs", "zero__stage": s, "graphs": True} for s in range(3)]
CLIPPED = {"adamw": {"train__clip": 0.05}, "lamb": {"train__clip": 0.05, "train__optimizer": "lamb"},
           "muon": {"train__clip": 0.05, "train__optimizer": "muon"}}  # fmt: skip
JOBS += [{"name": f"stage 0 {kind}", "zero__stage": 0} | changes for kind, changes in CLIPPED.items()]
JOBS += [{"name": "stage 0 shapes", "zero__stage": 0, "train__static_shapes": True}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return weights and events of a run, by its name and rank."""
    out = tmp_path_factory.mktemp("overlap")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    command += [str(TESTS / "overlap_ranks.py"), str(out), *map(json.dumps, JOBS)]
    paths = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-12000:]
    return lambda name, rank=0: torch.load(out / f"{name}.{rank}.pt")


def trained_weights(found):
    """Return what gradients moved. Attention does not depend on a key's bias: its gradient is rounding error, which
    Adam turns into a step.

    The target's EMA is left out: from stage 1 on it arrives in the next forward pass.
    """
    for name, weight in found["weights"].items():
        if name.startswith("target_encoder."):
            continue
        if name.endswith("qkv.bias"):
            q, _, v = weight.chunk(3)
            yield name, torch.cat([q, v])
        else:
            yield name, weight


def assert_near(found, expected):
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    for (name, weight), (_, other) in zip(trained_weights(found), trained_weights(expected), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("kind", ["", " micro", " bf16"])
def test_buckets_are_sent_before_the_backward_pass_reaches_the_first_layer(trained, stage, kind):
    micro_batches = 2 if kind else 1
    messages = len(buckets_of([p.size for p in layout_of(small_config("unread")).trained], BUCKET))
    for rank in range(WORLD):
        events = trained(f"stage {stage}{kind}", rank)["events"]
        assert len(events) == STEPS
        for step in events:
            reached = [i for i, event in enumerate(step) if event == "first layer"]
            assert len(reached) == micro_batches
            assert step.count("sent") == messages  # as the plan counts them
            before = [0, *reached]
            # Not in passes that only accumulate, and most of it in the last one.
            assert "sent" not in step[: before[-2]]
            assert step[before[-2] : before[-1]].count("sent") > step[before[-1] :].count("sent") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("micro", ["", " micro"])
def test_two_ranks_train_as_one_process_with_the_same_global_batch(trained, stage, micro):
    alone = train(start(alone=True), **(MICRO if micro else {}))
    for rank in range(WORLD):
        assert_near(trained(f"stage {stage}{micro}", rank), alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLIPPED)
def test_sums_of_two_ranks_are_clipped_as_their_mean(trained, kind):
    alone = train(start(alone=True), **CLIPPED[kind])
    found, other = trained(f"stage 0 {kind}"), trained(f"stage 0 {kind}", 1)
    assert_near(found, alone)
    assert all(torch.equal(found["weights"][name], weight) for name, weight in other["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_runs_are_equal_to_the_bit_and_so_are_their_ranks(trained, stage):
    once = trained(f"stage {stage}")["weights"]
    for other in (trained(f"stage {stage}", 1), trained(f"stage {stage} again"), trained(f"stage {stage} again", 1)):
        assert all(torch.equal(once[name], weight) for name, weight in other["weights"].items())


@pytest.mark.slow
def test_gradients_of_bf16_are_those_of_one_conversion_at_the_end(trained):
    early, late = trained("stage 0 bf16"), trained("stage 0 bf16 late")
    assert all(torch.equal(early["weights"][name], weight) for name, weight in late["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_of_which_one_replays_a_graph_and_another_does_not_sum_the_same_gradients(trained, stage):
    for rank in range(WORLD):
        assert_near(trained(f"stage {stage} graphs", rank), trained("stage 0 shapes", rank))
