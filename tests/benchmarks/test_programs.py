"""What every benchmark program does around its work: it checks outputs first and sets up its streams."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

import iwm_fast.benchmarks
from iwm_fast.cli.main import main
from iwm_fast.errors import UserError

FOLDER = Path(iwm_fast.benchmarks.__file__).resolve().parent
TEXTS = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in FOLDER.rglob("*.py")
}
RENAMED = {name.removeprefix("old_names.") for name in TEXTS if re.fullmatch(r"old_names\.(?!__init__)\w+", name)}
PROGRAMS = sorted(name for name, text in TEXTS.items() if '"__main__":' in text and not name.startswith("old_names."))
# An output path below a file, and the arguments that the program needs to get there.
BAD = "file/out.json"
WORDS = {
    "activations": ["--ijepa", "no_checkout", "--json", BAD],
    "sweep": ["demo.yaml", "--data", "d", "--out", "runs", "--arm", "a", "--json", BAD],
    "sweep, runs": ["demo.yaml", "--data", "d", "--out", "file/runs", "--arm", "a", "--json", "ok.json"],
    "attention": ["--json", BAD],
    "ceilings": ["--json", BAD],
    "data": ["--json", BAD],
    "dial": ["--data", "d", "--out", "runs", "--json", BAD],
    "dial, runs": ["--data", "d", "--out", "file/runs", "--json", "ok.json"],
    "dial, picture": ["--data", "d", "--out", "runs", "--json", "ok.json", "--picture", BAD],
    "plots.finetune": ["results.json", BAD],
    "plots.sweep": ["results.json", BAD],
    "plots.health": ["results.json", BAD],
    "plots.data": ["results.json", BAD],
    "plots.kernels": ["results.json", BAD],
    "plots.rollouts": [BAD, "a=results.json"],
    "engine": ["--json", BAD],
    "first_visit": ["--json", BAD],
    "finetune": ["run", "--data", "d", "--json", BAD],
    "gpu_suite": ["--device", "cpu", "--out", "file/out"],
    "index": ["--out", "scratch", "--json", BAD],
    "index, scratch": ["--out", "file/scratch", "--json", "ok.json"],
    "kernels": ["--json", BAD],
    "planning": ["--speed", "--json", BAD],
    "launches": ["--mlp", "64,32,64,4", "--json", BAD],
    "optimizers": ["--json", BAD],
    "peers": ["--device", "cpu", "--json", BAD],
    "flops_saved": ["--json", BAD],
    "triplet_speed": ["--scratch", "scratch", "--json", BAD],
    "triplet_speed, scratch": ["--scratch", "file/scratch", "--json", "ok.json"],
    "train": ["--scratch", "scratch", "--json", BAD],
    "train, scratch": ["--scratch", "file/scratch", "--json", "ok.json"],
    "scale": ["--json", BAD],
    "scale, scratch": ["--out", "file/scratch", "--json", "ok.json"],
    "setting_gain": ["train.compile=true", "--json", BAD],
    "steps_ahead": ["game.yaml", "--data", "d", "--out", "runs", "--json", BAD],
    "steps_ahead, runs": ["game.yaml", "--data", "d", "--out", "file/runs", "--json", "ok.json"],
    "shard_reads": ["--json", BAD],
}
INNER = {"ranks", "report"}  # one is started by bench scaling, the other writes into the tree


def test_at_the_top_lie_programs_and_what_the_command_bench_runs():
    top = {name for name in TEXTS if "." not in name and name != "__init__"}
    assert top - set(PROGRAMS) == {"compare", "scaling", "step"}


def test_every_program_is_tried():
    assert {name.split(",")[0] for name in WORDS} | INNER == set(PROGRAMS)


@pytest.mark.parametrize("case", WORDS)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["program", *WORDS[case]])
    program = importlib.import_module(f"iwm_fast.benchmarks.{case.split(',')[0]}")
    with pytest.raises(UserError, match=r"file/\w+(\.json)?: cannot be written: Not a directory; \w+ another"):
        program.main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_sets_up_its_streams(name):
    assert re.search(rf'__main__":\n(.*\n)?    sys\.exit\(run_program\("benchmarks\.{name}", ', TEXTS[name])


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_an_old_name_runs_the_program_and_says_its_new_one(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    for module in [module for module in sys.modules if module.startswith("iwm_fast.benchmarks")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"iwm_fast.benchmarks.{name}", run_name="__main__", alter_sys=True)
    shown = capsys.readouterr()
    assert ended.value.code == 0
    assert "usage:" in shown.out.lower()
    (line,) = shown.err.splitlines()
    new = re.fullmatch(rf"benchmarks\.{name} is now benchmarks\.([\w.]+); the next release removes the old name", line)
    assert new is not None
    assert new[1] in PROGRAMS


COMMANDS = {
    "data": ["bench", "data", "--json", BAD],
    "step": ["bench", "step", "--json", BAD],
    "kernels": ["bench", "kernels", "--json", BAD],
    "scaling": ["bench", "scaling", "--json", BAD],
    "compare": ["bench", "compare", "a.json", "b.json", "--json", BAD],
    "profile": ["profile", "demo", "--out", "file/out"],
    "plan": ["plan", "demo", "--plot", BAD],
    "plan, json": ["plan", "demo", "--json", BAD],
    "preview": ["data", "preview", "images", "--out", "file/out"],
    "synth": ["data", "synth", "--out", "file/out"],
    "shard": ["data", "shard", "images", "--out", "file/out"],
    "verify": ["data", "verify", "images", "--json", BAD],
    "finetune": ["finetune", "run", "--data", "images", "--out", "file/out"],
    "export": ["export", "run", "--out", "file/out"],
    "universal": ["export", "run", "--out", "file/out", "--layout", "universal"],
    "doctor": ["doctor", "--json", BAD],
    "demo": ["demo", "--out", "demo", "--json", BAD],
    "pretrain": ["pretrain", "demo", "data.root=images", "--out", "file/out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_it_in_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main([*COMMANDS[name]]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert re.fullmatch(r"iwm-fast: .*file(/\w+(\.json)?)?: .*Not a directory.*", line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
