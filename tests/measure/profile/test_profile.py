"""The profile of a small run: parts that add up, counts equal to the formulas', files that open, and the clock."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iwm_fast.actions.space import ActionSpace
from iwm_fast.cli.main import main
from iwm_fast.config import load_config, packaged_config
from iwm_fast.cost.flops import step_flops
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.kernels import TRITON_FUNCTIONS
from iwm_fast.measure.batches import BATCHES
from iwm_fast.measure.collective_time import CollectiveTime
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.operations import Work
from iwm_fast.measure.profile.limits import Limits
from iwm_fast.measure.profile.parts import PARTS, PartsClock, measured_parts
from iwm_fast.measure.profile.picture import step_figure
from iwm_fast.measure.profile.trace import trace_steps
from iwm_fast.measure.synthetic import synthetic_stream

KEYS = [
    "model.encoder={depth: 2, width: 64, heads: 2}", "model.predictor.depth=2", "model.predictor.width=64",
    "train.global_batch=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("profile")
    words = ["profile", "vit_tiny_p4_32.yaml", *KEYS, "--out", str(out), "--steps", "5", "--threads", "1"]
    assert main([*words, "--device", "cpu"]) == 0
    return out, json.loads((out / "profile.json").read_text())


def test_the_parts_of_a_real_step_are_named_and_within_it(profiled):
    _, found = profiled
    assert list(found["parts_s"]) == list(PARTS)
    assert found["parts_sum_s"] <= found["parts_step_s"]
    for part in ("forward target", "forward context", "predictor", "backward", "optimizer", "EMA"):
        assert found["parts_s"][part] > 0, part


class _CountedOperators(TorchDispatchMode):
    """A clock that advances by one per operator, so that load on the machine does not matter."""

    now = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.now += 1
        return func(*args, **(kwargs or {}))


def test_nearly_every_operator_of_a_step_belongs_to_a_part(monkeypatch):
    ranks = start(alone=True)
    config = load_config(packaged_config("vit_tiny_p4_32"), KEYS)
    space = ActionSpace(config.actions.groups, config.actions.form)
    trainer = prepare_trainer(config, space, synthetic_stream(config, space, ranks.device), ranks)
    trainer.train_step()
    with _CountedOperators() as operators, measured_parts(trainer, CollectiveTime()) as clock:
        monkeypatch.setattr("iwm_fast.measure.profile.parts.time.perf_counter", lambda: operators.now)
        with clock.step():
            trainer.train_step()
    parts, whole = clock.middle()
    assert sum(parts.values()) == whole == operators.now
    assert parts[""] <= 0.02 * whole
    assert {name for name, count in parts.items() if count} >= {
        "forward target", "forward context", "predictor", "loss", "backward", "optimizer", "EMA",
    }  # fmt: skip


def test_operations_are_the_steps_formula(profiled):
    _, found = profiled

    config = load_config(packaged_config("vit_tiny_p4_32"), KEYS)
    space = ActionSpace(config.actions.groups, config.actions.form)
    # The counted step uses one of the batches that it cycles through.
    batches = synthetic_stream(config, space, torch.device("cpu"), steps=BATCHES)
    sizes = [
        step_flops(config.model, space.dim, b.patches.context_lengths, b.patches.target_lengths).total
        for b in batches._batches
    ]
    assert found["operations"] in sizes
    modules = {row["name"]: row for row in found["modules"]}
    parts = sum(modules[name]["operations"] for name in ("target_encoder", "encoder", "predictor"))
    assert parts == found["operations"]
    assert modules["encoder"]["backward_s"] > 0
    assert modules["target_encoder"]["backward_s"] == 0


def test_files_open(profiled):
    out, found = profiled
    trace = json.loads((out / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"iwm/data", "module encoder.blocks.0", "module predictor"} <= names
    assert (out / "step.png").read_bytes().startswith(b"\x89PNG")
    assert "| forward target |" in (out / "profile.md").read_text()
    timeline = json.loads((out / "memory.json").read_text())["timeline"]
    assert max(held for _, held in timeline) == found["memory_peak_bytes"] > 0
    assert found["schema"] == "iwm-fast-profile/1"


def test_no_row_is_faster_than_what_was_measured(profiled):
    """Every matmul has its share; a row that exceeds the limits has none."""
    _, found = profiled
    rows = found["operators"] + found["modules"]
    assert all(row["roofline_share"] is None or 0 < row["roofline_share"] <= 1 for row in rows)
    assert {r["name"] for r in found["operators"] if r["roofline_share"] is not None} & {"aten::mm", "aten::addmm"}
    assert all(row["mfu"] is None for row in rows)  # no CPU's peak is known


def test_limits_by_hand():
    """A call is limited by its FLOPs or its bytes; small ones by the fastest copy of their size or larger."""
    limits = Limits(100.0, ((10, 5.0), (100, 50.0), (1000, 20.0)))
    assert [limits.bytes_per_s(size) for size in (1, 10, 99, 100, 1000, 10**6)] == [50, 50, 50, 50, 20, 20]
    work = Work()
    work.add(operations=400, size=2000)  # 4 s of operations, 100 s of bytes
    work.add(operations=400, size=50)  # 4 s, 1 s
    assert limits.seconds(work) == 104
    assert limits.share(208, work) == 0.5
    assert limits.share(104, work) == 1
    assert limits.share(103, work) is None
    assert limits.share(0, work) is None
    assert limits.share(1, Work()) is None


def test_an_operator_is_timed_with_what_it_calls_and_once():
    """Stacking calls a concatenation, which must not be counted separately."""
    parts = [torch.zeros(1 << 16) for _ in range(4)]
    counted = ("aten::stack", "aten::cat", "aten::add")
    traced = trace_steps(lambda: torch.stack(parts).add(1), torch.nn.Identity(), torch.device("cpu"), 2, counted)
    assert traced.counted.keys() == {"aten::stack", "aten::add"}
    assert traced.counted["aten::stack"] >= traced.operators["aten::cat"][0]


@pytest.mark.parametrize("steps", [1, 5])
def test_the_picture_names_what_its_line_is(steps):
    figure = step_figure({"forward": 0.1, "backward": 0.3}, 0.41, steps, [(0.0, 0), (0.1, 2**20)])
    above = figure.axes[0]
    assert above.lines[0].get_xdata()[0] == pytest.approx(410)
    assert above.get_xlabel() == "milliseconds; the line is the end of this step"
    assert above.get_title() == ("parts of the step of median time of 5" if steps == 5 else "parts of the only step")


def test_a_kernel_that_is_none_is_refused_with_the_names_of_all(tmp_path, capsys):
    for word in ("conditioned_mlp", "norm"):
        assert main(["profile", "demo", "--out", str(tmp_path / "p"), "--ncu", word]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"--ncu: {word}: no such kernel; there are {', '.join(TRITON_FUNCTIONS)}" in said


def test_ncu_prints_one_command(tmp_path, capsys):
    assert main(["profile", "demo", "train.lr=2e-4", "--out", str(tmp_path / "p"), "--ncu", "norm_kernel"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith("ncu --set full")
    assert "--kernel-name regex:^norm_kernel$ " in " ".join(shlex.split(printed)) + " "
    for word in ("--config demo train.lr=2e-4", "--launch-count 1", "--launch-skip 20", "--repeats 20"):
        assert word in printed
    assert not (tmp_path / "p").exists()


def test_the_clock_gives_time_to_whoever_was_entered_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("iwm_fast.measure.profile.parts.time.perf_counter", lambda: now[0])
    clock = PartsClock(torch.device("cpu"))
    with clock.step():
        now[0] += 1
        clock.enter("outer")
        now[0] += 2
        clock.enter("inner")
        now[0] += 4
        clock.leave()
        now[0] += 8
        clock.leave()
        now[0] += 16
    assert clock.middle() == ({"": 17.0, "outer": 10.0, "inner": 4.0}, 31.0)


def test_the_step_shown_is_the_middle_one():
    clock = PartsClock(torch.device("cpu"))
    clock.steps, clock.totals = [{"a": 5.0}, {"a": 1.0}, {"a": 3.0}], [5.0, 1.0, 3.0]
    assert clock.middle() == ({"a": 3.0}, 3.0)


@pytest.mark.parametrize(
    "frozen",
    [
        pytest.param((), id="trained", marks=pytest.mark.slow),
        pytest.param(("model.freeze_encoder=true", "model.init=unread"), id="frozen"),
    ],
)
def test_files_and_a_shared_target_have_their_parts(tiny_images, tmp_path, frozen):
    """Without a separate target, its forward pass is the encoder's pass over whole images."""
    words = [
        "profile",
        "vit_tiny_p4_32.yaml",
        *KEYS,
        "model.target=shared",
        *frozen,
        f"data.root={tiny_images}",
        "data.threads=1",
        "--out",
        str(tmp_path),
        "--steps",
        "1",
    ]
    assert main([*words, "--threads", "1", "--device", "cpu"]) == 0
    parts = json.loads((tmp_path / "profile.json").read_text())["parts_s"]
    assert parts["forward target"] > 0
    assert parts["forward context"] > 0
    assert parts["EMA"] == 0
    assert parts["data wait"] > 0
