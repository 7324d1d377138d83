"""Bytes sent and held, counted on real ranks under DeepSpeed, against the plan's formulas for stages 0 to 3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import small_config

from iwm_fast.config.batch import divide_batch
from iwm_fast.cost.communication import ring_bytes, step_collectives
from iwm_fast.cost.memory import layout_of, state_memory

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


MORE = pytest.mark.skipif(not os.environ.get("IWM_TEST_MORE_RANKS"), reason="set IWM_TEST_MORE_RANKS=1: a minute")


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=MORE), pytest.param(4, marks=MORE)], ids="{} ranks".format
)
def counted(request, tiny_images, tmp_path_factory):
    """(ranks, counts of each case's ranks)."""
    world, out = request.param, tmp_path_factory.mktemp("counted")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += [str(HERE / "counted_ranks.py"), str(tiny_images), str(out), *(json.dumps(ODD | c) for c in CASES)]
    paths = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-12000:]
    return world, json.loads((out / "counted.json").read_text())


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_bytes_sent_are_the_formula(counted, case):
    world, notes = counted
    config = small_config(Path("unused"), **(ODD | CASES[case]))
    _, accumulation = divide_batch(12, world, config.train.micro_batch)
    expected = step_collectives(config, layout_of(config), world, accumulation)
    for note in notes[case]:
        large = [(kind, size) for kind, size in note["calls"] if size > 8]
        assert sum(size for kind, size in note["calls"] if size <= 8) < SCALARS
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
