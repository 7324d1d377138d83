"""The profile of a small run: parts that add up, counts that are the formulas', files that open, and the clock."""

from __future__ import annotations

import json

import pytest
import torch

from iwm_fast.actions import ActionSpace
from iwm_fast.benchmarks.synthetic import synthetic_stream
from iwm_fast.cli import main
from iwm_fast.config import load_config, packaged_config
from iwm_fast.planning.flops import step_flops
from iwm_fast.profiling.parts import PARTS, PartsClock

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


def test_parts_add_up_to_the_step(profiled):
    """Parts are exclusive and from one real step: noise cannot part their sum from it, only work without a name can."""
    _, found = profiled
    assert list(found["parts_s"]) == list(PARTS)
    assert found["parts_sum_s"] == pytest.approx(found["parts_step_s"], rel=0.05)
    for part in ("forward target", "forward context", "predictor", "backward", "optimizer", "EMA"):
        assert found["parts_s"][part] > 0, part


def test_operations_are_the_steps_formula(profiled):
    _, found = profiled

    config = load_config(packaged_config("vit_tiny_p4_32"), KEYS)
    space = ActionSpace(config.actions.groups, config.actions.form)
    # The counted step is one of the two batches that it cycles through.
    batches = synthetic_stream(config, space, torch.device("cpu"))
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


def test_ncu_prints_one_command(tmp_path, capsys):
    assert main(["profile", "demo", "train.lr=2e-4", "--out", str(tmp_path / "p"), "--ncu", "hidden_kernel"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith("ncu --set full")
    for word in ("--kernel-name regex:hidden_kernel", "--config demo train.lr=2e-4", "--launch-count 1"):
        assert word in printed
    assert not (tmp_path / "p").exists()


def test_the_clock_gives_time_to_whoever_was_entered_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("iwm_fast.profiling.parts.time.perf_counter", lambda: now[0])
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


def test_files_and_a_shared_target_have_their_parts(tiny_images, tmp_path):
    """Without an encoder of its own the target's forward is the encoder's pass without gradients."""
    words = [
        "profile",
        "vit_tiny_p4_32.yaml",
        *KEYS,
        "model.target=shared",
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
    assert parts["EMA"] == 0
    assert parts["data wait"] > 0
