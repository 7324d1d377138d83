"""ZeRO within a host in the plan: its messages, its memory, and where it is recommended."""

import shlex

import numpy as np
import pytest

from iwm_fast.benchmarks.cases.presets import preset_config
from iwm_fast.cost.communication import LINK_EFFICIENCY, LINK_HOP_S, Collective, Fabric, ring_bytes, step_collectives
from iwm_fast.cost.devices import DEVICES, Rate
from iwm_fast.cost.memory import layout_of, state_memory
from iwm_fast.cost.plan import Cluster, Planner
from iwm_fast.cost.report import ImageCount, document, memory_columns, memory_rows, sentences, stage_rows
from iwm_fast.cost.tokens import Tokens
from iwm_fast.errors import UserError

SET = ImageCount(1_281_167, "given", "--images")
SHARDED, COPIES = ("zero.stage=3", "train.global_batch=2048"), "zero.hpz_partition_size=8"
# A frozen teacher of twice the width, on GPUs whose hosts have little memory between them and a slow network.
TEACHER = (
    "model.target=frozen", "model.target_init=w", "train.activation_checkpointing=false",
    "model.target_encoder={encoder: {depth: 40, width: 1408, heads: 16}}",
    "model.patch=14", "model.encoder=vit_base",
)  # fmt: skip


def planner_of(*words: str) -> Planner:
    config = preset_config("gpu-base", (*SHARDED, *words))
    return Planner(config, Tokens(np.full(64, 40), np.full(64, 60)))


@pytest.fixture(scope="module")
def base():
    return planner_of()


@pytest.fixture(scope="module")
def teacher():
    return planner_of(*TEACHER)


def changed(planner, *words):
    other = preset_config("gpu-base", (*SHARDED, *words))
    return Planner(other, planner.tokens, planner.layout)


def hosts(nodes=8, gpu="h200", network=None) -> Cluster:
    device = DEVICES[gpu]
    return Cluster(device, nodes, 8, Rate(0.4, "given", "--mfu"), network or device.network)


def test_messages_within_a_host_cross_no_network():
    """By hand: a ring of eight, seven hops."""
    fabric = Fabric(4, 8, 400e9, 50e9)
    moved = fabric.transfer(Collective("parameters", "all_gather", 800, 3, ranks=8))
    assert (moved.network_bytes, moved.link_bytes) == (0.0, ring_bytes("all_gather", 800, 8))
    assert moved.seconds == pytest.approx(700 / (400e9 * LINK_EFFICIENCY) + 3 * 7 * LINK_HOP_S)


@pytest.mark.parametrize(("micro", "accumulation"), [(32, 1), (8, 4)])
def test_only_the_first_gather_of_a_step_crosses_the_network(base, micro, accumulation):
    plain, copies = (
        step_collectives(changed(base, *words).config, base.layout, 64, accumulation) for words in ((), (COPIES,))
    )
    once = 64 * base.layout.divided((*base.layout.trained, *base.layout.target), 64) * 2
    gathered = [[c for c in found if c.kind == "all_gather"] for found in (plain, copies)]
    assert sum(c.size for c in gathered[0]) == sum(c.size for c in gathered[1]) == once * accumulation
    assert sum(c.size for c in gathered[1] if not c.ranks) == once
    assert {c.ranks for c in gathered[1]} <= {0, 8}
    assert [c for c in plain if c.kind != "all_gather"] == [c for c in copies if c.kind != "all_gather"]
    assert micro * accumulation * 64 == 2048


def test_the_copy_is_an_eighth_of_every_parameter(teacher):
    layout = teacher.layout
    plain, copies = (state_memory(changed(teacher, *TEACHER, *words).config, layout, 64) for words in ((), (COPIES,)))
    whole = 64 * layout.divided((*layout.trained, *layout.target, *layout.frozen), 64)
    assert copies.host_copy == 2 * whole // 8
    assert copies.total - plain.total == copies.host_copy


def test_it_is_planned_on_several_hosts_and_not_recommended_where_a_step_gathers_once(base):
    record = document(base, hosts(), SET)
    copies = [v for v in record["variants"] if v["hpz_partition_size"] == 8]
    assert {(v["stage"], v["activation_checkpointing"]) for v in copies} == {(3, False), (3, True)}
    (why,) = [
        e["why"] for e in record["left_out"] if e["hpz_partition_size"] == 8 and not e["activation_checkpointing"]
    ]
    assert "slower than stage 3 without copies within hosts: a step gathers each parameter once" in why
    assert "hpz" not in record["recommended"]["change"]
    assert any(row[0] == "3 hpz 8" for row in stage_rows(record["variants"], 2048, record["recommended"]))
    assert memory_columns(record["variants"])[-1] == "host copy"
    assert all(len(row) == len(memory_columns(record["variants"])) for row in memory_rows(record["variants"]))
    one = document(base, hosts(1), SET)
    assert {v["hpz_partition_size"] for v in one["variants"]} == {1}


def test_a_frozen_teacher_over_a_slow_network_has_copies_recommended_and_pasting_them_changes_nothing_more(teacher):
    """Neither the teacher's 10⁹ parameters nor what the backward pass gathers again cross the network."""
    at = hosts(gpu="a100", network=2e9)
    small = changed(teacher, *TEACHER, "zero.stage=2")
    record = document(small, at, SET)
    assert record["recommended"]["hpz_partition_size"] == 8
    assert COPIES in record["recommended"]["change"].split()
    plain, copies = (
        next(v for v in record["variants"] if (v["stage"], v["activation_checkpointing"], v["hpz_partition_size"]) == k)
        for k in ((3, False, 1), (3, False, 8))
    )
    frozen = 64 * teacher.layout.divided(teacher.layout.frozen, 64) * 2
    crossing = plain["network_bytes"] - copies["network_bytes"]
    again = sum(c["size"] for c in plain["collectives"] if c["what"] == "parameters again")
    assert 0 < again < frozen / 5
    assert crossing == pytest.approx(63 / 64 * (frozen + again) / 8)
    assert copies["step_s"]["total"] * 1.05 < plain["step_s"]["total"]
    again = document(changed(teacher, *TEACHER, *shlex.split(record["recommended"]["change"])), at, SET)
    assert again["recommended"]["change"] == ""
    assert "zero.stage=3 zero.hpz_partition_size=8 train.act" in "\n".join(sentences(again, None))
    assert again["configured"]["hours"] == pytest.approx(record["hours"])


def test_copies_that_gain_nothing_are_taken_away(base):
    """Ten times the launches of a small step: 5 % is a reason for a change, as between stages."""
    record = document(changed(base, COPIES), hosts(), SET)
    assert record["configured"]["hpz_partition_size"] == 8
    assert record["recommended"]["hpz_partition_size"] == 1
    assert "zero.hpz_partition_size=1" in record["recommended"]["change"].split()


def test_launches_that_wait_for_the_copies_are_counted_once_per_step(base):
    """In one of four micro-batches: forward the target's 12 blocks, backward those of encoder and predictor."""
    words = ("train.micro_batch=8", "train.activation_checkpointing=false")
    plain, copies = (changed(base, *words, *more).configured(hosts(gpu="a100")).time for more in ((), (COPIES,)))
    blocks = 12 + base.config.model.predictor.depth
    assert copies.forward - plain.forward == pytest.approx(12 * 80e-6, rel=0.5)
    assert 0 < copies.backward - plain.backward <= blocks * 2 * 80e-6 * 1.0001


def test_a_size_that_spans_hosts_is_refused_in_one_line(base):
    with pytest.raises(UserError, match="ranks 0 to 15 are on several hosts"):
        document(changed(base, "zero.hpz_partition_size=16"), hosts(), SET)


def test_the_layout_of_the_teacher_is_mostly_frozen(teacher):
    assert layout_of(teacher.config).frozen_size > 5 * teacher.layout.trained_size
