"""Bytes sent and held, counted on real ranks under DeepSpeed, against the plan's formulas for stages 0 to 3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import small_config

from iwm_fast.config import load_config, packaged_config
from iwm_fast.config.batch import divide_batch
from iwm_fast.cost import communication
from iwm_fast.cost.communication import ring_bytes, step_collectives
from iwm_fast.cost.memory import layout_of, stage_settings, state_memory

HERE = Path(__file__).parent
SCALARS = 100  # bytes: a step's norm and votes, which the formula leaves out
# Sizes that no number of ranks divides, so that every padding occurs: width 36 with 3 heads, MLP ratio 7.
ODD = {
    "model__encoder": {"depth": 2, "width": 36, "heads": 3, "mlp_ratio": 1.75},
    "train__global_batch": 12,
    "train__steps": 4,
    "log__every_steps": 2,  # so that the third step, the measured one, gathers nothing for logging
    "checkpoint__every_steps": 1000,
}
SHAPES = [(stage, "bf16", 2) for stage in range(4)] + [(1, "fp32", None), (3, "fp32", None)]
CASES = [{"zero__stage": s, "train__precision": p, "train__micro_batch": m} for s, p, m in SHAPES]
NAMES = [f"stage {s} {p} micro {m}" for s, p, m in SHAPES]
# Frozen parts, whose values do not matter: ranks start from random ones.
WIDE = {"depth": 1, "width": 44, "heads": 1, "mlp_ratio": 1.25}
FROZEN = {
    "frozen target": {"model__target": "frozen", "model__target_init": "w", "model__target_encoder": {"encoder": WIDE}},
    "frozen encoder": {"model__freeze_encoder": True, "model__init": "w", "model__target": "shared"},
}
for stage, precision, name in (
    (0, "bf16", "frozen target"), (1, "bf16", "frozen target"),
    (2, "bf16", "frozen encoder"), (3, "bf16", "frozen encoder"),
):  # fmt: skip
    CASES.append({"zero__stage": stage, "train__precision": precision, "train__micro_batch": 2} | FROZEN[name])
    NAMES.append(f"stage {stage} {precision} {name}")
CASES += [{"zero__stage": 0, "train__precision": p, "train__optimizer": "muon"} for p in ("bf16", "fp32")]
NAMES += [f"stage 0 {p} muon" for p in ("bf16", "fp32")]


MORE = pytest.mark.skipif(not os.environ.get("IWM_TEST_MORE_RANKS"), reason="set IWM_TEST_MORE_RANKS=1: a minute")


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=MORE), pytest.param(4, marks=MORE)], ids="{} ranks".format
)
def counted(request, tiny_images, tmp_path_factory):
    """(ranks, counts of each case's ranks)."""
    return request.param, count(request.param, tiny_images, tmp_path_factory.mktemp("counted"), CASES)


def count(world, images, out, cases):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += [str(HERE / "counted_ranks.py"), str(images), str(out), *(json.dumps(ODD | c) for c in cases)]
    paths = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-12000:]
    return json.loads((out / "counted.json").read_text())


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_bytes_sent_are_the_formula(counted, case):
    world, notes = counted
    config = small_config(Path("unused"), **(ODD | CASES[case]))
    _, accumulation = divide_batch(12, world, config.train.micro_batch)
    expected = step_collectives(config, layout_of(config), world, accumulation)
    for note in notes[case]:
        large = [(kind, size) for kind, size, _ in note["calls"] if size > 8]
        assert sum(size for _, size, _ in note["calls"] if size <= 8) < SCALARS
        assert {ranks for _, _, ranks in note["calls"]} == {world}
        for kind in {kind for kind, _ in large} | {c.kind for c in expected}:
            assert sum(s for k, s in large if k == kind) == sum(c.size for c in expected if c.kind == kind), kind
        if config.zero.stage < 3:
            calls = sum(c.calls for c in expected if c.kind == "all_reduce")
            assert [kind for kind, _ in large].count("all_reduce") == calls
        sent = sum(ring_bytes(kind, size, world) for kind, size in large)
        assert sent == pytest.approx(sum(ring_bytes(c.kind, c.size, world) for c in expected))


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_memory_of_a_rank_is_the_formula(counted, case):
    world, notes = counted
    config = small_config(Path("unused"), **(ODD | CASES[case]))
    stage, layout = config.zero.stage, layout_of(config)
    plan = state_memory(config, layout, world)
    held = {key: max(note["memory"][key] for note in notes[case]) for key in ("online", "constant", "optimizer", "ema")}
    if stage == 0:
        # The target reads the EMA itself: one memory. Rounded copies exist inside the step only.
        assert held["ema"] == plan.ema
        frozen = held["constant"] - held["ema"]
        assert bool(frozen) is bool(layout.frozen)
        rounded = 2 * (layout.trained_size + layout.target_size) if config.train.precision == "bf16" else 0
        assert held["online"] + rounded + frozen == plan.parameters
    else:
        assert held["online"] + held["constant"] == plan.parameters
        assert held["ema"] == plan.ema
    assert held["optimizer"] == plan.optimizer
    gradients = max(note["gradients"] for note in notes[case])
    if stage == 2:
        # DeepSpeed holds a parameter's gradient whole on each rank that has a part of it.
        largest = max(p.size for p in layout.trained)
        element = 2 if config.train.precision == "bf16" else 4
        slack = 2 * element * largest * len(layout.groups())
        assert plan.gradients - slack <= gradients <= plan.gradients + slack
    elif stage != 1:
        assert gradients == plan.gradients
    elif config.train.micro_batch:
        assert gradients == plan.gradients  # whole only while micro-batches accumulate


# Within a host, on four ranks: pairs hold a copy. A short reuse distance makes a step gather parameters twice, as it
# does in models of 10⁹ elements; nothing is prefetched, which would keep them.
SHARDED = {"zero__stage": 3, "train__precision": "bf16", "train__micro_batch": 1}
PAIRS = {"zero__hpz_partition_size": 2}
SOME = {"distance": 60_000, "train__activation_checkpointing": True}
HOSTS = {
    "pairs": SHARDED | PAIRS,
    "after pairs": SHARDED,
    "fp32": SHARDED | PAIRS | {"train__precision": "fp32", "train__micro_batch": None},
    "fours": SHARDED | {"zero__hpz_partition_size": 4},
    "frozen target": SHARDED | PAIRS | FROZEN["frozen target"],
    "frozen encoder": SHARDED | PAIRS | FROZEN["frozen encoder"],
    "all twice": SHARDED | {"distance": 0},
    "all twice in pairs": SHARDED | PAIRS | {"distance": 0},
    "some twice": SHARDED | SOME,
    "some twice in pairs": SHARDED | PAIRS | SOME,
}


@pytest.fixture(scope="module")
def on_hosts(tiny_images, tmp_path_factory):
    cases = []
    for case in HOSTS.values():
        distance = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": case.get("distance")}
        settings = {"settings": distance} if "distance" in case else {}
        cases.append({key: value for key, value in case.items() if key != "distance"} | settings)
    return dict(zip(HOSTS, count(4, tiny_images, tmp_path_factory.mktemp("hosts"), cases), strict=True))


@pytest.mark.slow  # four ranks, ten trainings
@pytest.mark.parametrize("case", HOSTS)
def test_bytes_sent_over_the_network_and_within_a_host_are_the_formula(on_hosts, case, monkeypatch):
    changes = ODD | HOSTS[case]
    distance = changes.pop("distance", None)
    if distance is not None:
        settings = stage_settings(3) | {"stage3_max_reuse_distance": distance}
        monkeypatch.setattr(communication, "stage_settings", lambda _: settings)
    config = small_config(Path("unused"), **changes)
    _, accumulation = divide_batch(12, 4, config.train.micro_batch)
    layout = layout_of(config)
    expected = {}
    for one in step_collectives(config, layout, 4, accumulation):
        key = (one.kind, one.ranks or 4)
        expected[key] = expected.get(key, 0) + one.size
    for note in on_hosts[case]:
        found = {}
        for kind, size, ranks in note["calls"]:
            if size > 8:
                found[kind, ranks] = found.get((kind, ranks), 0) + size
        assert found.keys() == expected.keys()
        # Where some are gathered twice, DeepSpeed decides by module, and the formula by parameter.
        module = 2 * accumulation * 2 * max(p.size for p in layout.trained) if distance else 0
        assert all(abs(found[key] - expected[key]) <= module for key in found)
        assert note["copy"] == state_memory(config, layout, 4).host_copy


def test_a_vit_l_gathers_some_parameters_twice_and_a_vit_b_none():
    """Between the first block's forward and backward pass of a ViT-L 1.3e9 elements are read."""
    found = {}
    for name in ("vit_base_p16_224_equi", "vit_large_p16_224"):
        config = load_config(packaged_config(f"{name}.yaml"), ["zero.stage=3"])
        layout = layout_of(config)
        again = [c.size for c in step_collectives(config, layout, 64, 1) if c.what == "parameters again"]
        found[name] = sum(again) / (2 * layout.trained_size)
    assert found["vit_base_p16_224_equi"] == 0
    assert 0.05 < found["vit_large_p16_224"] < 0.5
