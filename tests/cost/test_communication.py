"""The plan's messages: how many, and which of them the backward pass hides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iwm_fast.benchmarks.cases.presets import preset_config
from iwm_fast.cost.communication import Collective, Fabric, step_collectives
from iwm_fast.cost.devices import DEVICES
from iwm_fast.cost.memory import BUCKET_BYTES, buckets_of, layout_of, state_memory
from iwm_fast.cost.step_time import step_time
from iwm_fast.cost.tokens import Tokens


@given(st.lists(st.integers(1, 50)), st.integers(1, 100))
def test_buckets_hold_every_size_once_from_the_last_and_are_as_full_as_they_may(sizes, most):
    buckets = buckets_of(sizes, most)
    assert [i for bucket in buckets for i in bucket] == list(reversed(range(len(sizes))))
    sums = [sum(sizes[i] for i in bucket) for bucket in buckets]
    assert all(total <= most or len(bucket) == 1 for total, bucket in zip(sums, buckets, strict=True))
    following = [sizes[bucket[0]] for bucket in buckets[1:]]
    assert all(total + size > most for total, size in zip(sums, following, strict=False))


@pytest.fixture(scope="module")
def base():
    """ViT-B with 256 images at ZeRO stage 0, and its layout."""
    config = preset_config("gpu-base", ("zero.stage=0", "train.global_batch=256"))
    return config, layout_of(config)


def at_stage(config, stage, **train):
    zero, changed = config.zero.model_copy(update={"stage": stage}), config.train.model_copy(update=train)
    return config.model_copy(update={"zero": zero, "train": changed})


@pytest.mark.parametrize(("stage", "most"), [(0, BUCKET_BYTES // 4), (1, 25_000_000), (2, 25_000_000), (3, 10**8)])
def test_gradients_are_sent_beside_the_backward_pass_in_the_layouts_buckets_but_for_the_last(base, stage, most):
    config, layout = base
    sizes = [p.size for p in layout.trained]
    buckets = buckets_of(sizes, most)
    found = step_collectives(at_stage(config, stage), layout, 8, 2)
    (gradients,) = [c for c in found if c.what == "gradients"]
    assert gradients.hidden_by == "backward"
    assert gradients.calls == len(buckets) * (1 if stage < 2 else 2)
    assert gradients.last == sum(sizes[i] for i in buckets[-1]) / sum(sizes)
    assert (len(buckets) > 3) == (stage < 3)


def planned(config, layout, collectives, fabric):
    tokens = Tokens(np.full(256, 40), np.full(256, 60))
    return step_time(config, layout, tokens, collectives, fabric, DEVICES["h100"], 0.4, None)


def exposed(config, layout, collectives, fabric):
    return planned(config, layout, collectives, fabric).exposed


@pytest.mark.parametrize(
    ("stage", "what", "sent"),
    [(0, "gradients", 1), (1, "gradients", 1), (2, "gradients", 4), (1, "target's average", 1)],
)
def test_of_four_micro_batches_messages_overlap_with_those_that_they_are_sent_beside(base, stage, what, sent):
    """On a network so slow that computation hides what it can: all of the pass, or the quarter of one micro-batch."""
    config, layout = at_stage(base[0], stage), base[1]
    fabric = Fabric(8, 1, 400e9, 1e8)
    one, four = ([c for c in step_collectives(config, layout, 8, n) if c.what == what] for n in (1, 4))
    times = planned(config, layout, one, fabric)
    beside = times.forward if what == "target's average" else times.backward
    alone = fabric.transfer(one[0]).seconds
    assert times.exposed == pytest.approx(alone - beside)
    assert exposed(config, layout, four, fabric) == pytest.approx(sent * alone - beside * (1 if sent == 4 else 0.25))


def test_a_long_backward_pass_hides_all_but_the_last_bucket_and_a_slow_network_shows(base):
    config, layout = base
    (gradients,) = step_collectives(config, layout, 8, 1)
    fast, slow = Fabric(1, 8, 400e9, 50e9), Fabric(8, 1, 400e9, 1e8)
    taken = fast.transfer(gradients).seconds
    assert exposed(config, layout, [gradients], fast) == pytest.approx(gradients.last * taken)
    assert exposed(config, layout, [gradients], slow) > 0.9 * slow.transfer(gradients).seconds


def test_with_cuda_graphs_nothing_is_hidden(base):
    config, layout = base
    graphs = at_stage(config, 0, static_shapes=True, cuda_graph=True)
    fabric = Fabric(1, 8, 400e9, 50e9)
    (gradients,) = step_collectives(graphs, layout, 8, 1)
    assert exposed(graphs, layout, [gradients], fabric) == pytest.approx(fabric.transfer(gradients).seconds)


def test_a_message_that_is_no_gradient_has_no_last_bucket():
    assert Collective("parameters", "all_gather", 100, 1).last == 0.0


def test_buckets_cost_one_at_stage_0_and_three_of_deepspeeds_at_stage_1(base):
    config, layout = base
    fp32 = at_stage(config, 0, precision="fp32")
    sizes = [p.size for p in layout.trained]
    largest = 4 * max(sum(sizes[i] for i in bucket) for bucket in buckets_of(sizes, BUCKET_BYTES // 4))
    assert state_memory(config, layout, 8).workspace == state_memory(fp32, layout, 8).workspace == largest
    assert largest <= BUCKET_BYTES
    # A single rank sends nothing; bf16 gradients are complete when they are converted.
    assert state_memory(fp32, layout, 1).workspace == 0
    assert state_memory(config, layout, 1).workspace == 2 * layout.trained_size
    share = 4 * sum(layout.flat_sizes(8)) // 8
    assert state_memory(at_stage(config, 1), layout, 8).workspace == 3 * 2 * 25_000_000 + share
    assert state_memory(at_stage(config, 1), layout, 1).workspace == 4 * sum(layout.flat_sizes(1))
