"""The GPU suite: a failing part costs the others nothing, and time limits hold."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from iwm_fast.benchmarks import gpu_suite
from iwm_fast.benchmarks.gpu_suite import PARTS, Part

# Writes a row, prints something, starts a child process, and then behaves as its argument says.
_PROGRAM = """
import json, os, signal, subprocess, sys, time
file, how = sys.argv[1:]
child = subprocess.Popen(["sleep", "300"])
open(file, "w").write(json.dumps({"rows": [{"child": child.pid}]}))
print("half way", flush=True)
if how == "hang": time.sleep(300)
if how == "crash": os.kill(os.getpid(), signal.SIGSEGV)
if how == "fail": sys.exit("no such operator")
"""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Replace the suite's programs by ones that end in a given way."""
    (tmp_path / "told_part.py").write_text(_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def put(**how: str) -> list[str]:
        told = {
            name: Part(60.0 if ends != "hang" else 4.0, lambda _args, file, e=ends: ["told_part", str(file), e])
            for name, ends in how.items()
        }
        monkeypatch.setattr(gpu_suite, "PARTS", told)
        return ["--device", "cpu", "--patience", "1", "--out", str(tmp_path / "out"), "--parts", *told]

    return put


def _alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hang", "killed at its limit, 4 s"),
        ("crash", "killed by signal 11"),
        ("fail", "exit code 1: no such operator"),
    ],
)
def test_a_part_that_does_not_end_well_leaves_its_rows_and_words_and_no_process(parts, tmp_path, capfd, how, said):
    assert gpu_suite.main(parts(step=how, doctor="well")) == 1
    failed, done = (json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("step", "doctor"))
    assert said in failed["error"]
    assert "half way" in failed["said"]
    assert "error" not in done
    for part in (failed, done):
        (row,) = part["result"]["rows"]
        assert not _alive(row["child"])
    assert [line.split(" in ")[0] for line in capfd.readouterr().out.splitlines()][1] == "doctor: done"


def test_the_archive_has_what_the_parts_wrote_and_no_images(parts, tmp_path):
    words = parts(step="well")
    (tmp_path / "out/profile").mkdir(parents=True)
    (tmp_path / "out/profile/trace.json").write_text("[" + "0," * 10**6 + "0]")
    (tmp_path / "out/train").mkdir()
    for name in ("train/a.jpg", "train/metrics.jsonl", "picture.png"):
        (tmp_path / "out" / name).write_bytes(os.urandom(1000))
    assert gpu_suite.main(words) == 0
    with tarfile.open(tmp_path / "out/results.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["profile/trace.json", "step.json", "step.log"]


def test_what_is_too_large_for_the_archive_is_named(parts, tmp_path, monkeypatch, capfd):
    words = parts(step="well")
    monkeypatch.setattr(gpu_suite, "_ARCHIVE_BYTES", 50_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/trace.json").write_text("x" * 10**6)
    assert gpu_suite.main(words) == 0
    assert "left out for its size: trace.json" in capfd.readouterr().out


def test_nothing_begins_after_its_time(parts, tmp_path, capfd):
    assert gpu_suite.main([*parts(step="hang", doctor="well"), "--budget", "0.5"]) == 1
    assert "killed at its limit, 0 s" in json.loads((tmp_path / "out/step.json").read_text())["error"]
    assert not (tmp_path / "out/doctor.json").exists()
    assert "doctor: not started" in capfd.readouterr().out


def test_the_most_valuable_part_comes_first_and_all_but_the_last_fit_into_a_run(capsys, tmp_path):
    order = ["doctor", "ceilings", "step", "attention", "kernels", "profile", "peers", "tests", "train", "settings",
             "optimizers"]  # fmt: skip
    assert list(PARTS) == [*order, "autotune"]
    assert gpu_suite.main(["--out", str(tmp_path), "--dry"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:-1]] == order
    assert said[-1] == "together at most 540 s; the last part may use what the others leave of 540 s"


@pytest.mark.parametrize(
    ("name", "device", "left", "seconds"),
    [("step", "cuda", 540, 80), ("step", "cpu", 540, 160), ("step", "cuda", 50, 50), ("settings", "cuda", 200, 200)],
)
def test_a_part_has_its_limit_and_the_last_one_what_is_left(name, device, left, seconds):
    args = argparse.Namespace(device=device, patience=None, parts=["step", "settings"])
    assert gpu_suite.limit_of(name, args, left) == seconds


class ParsedError(Exception):
    """The command line was parsed."""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [name for name in PARTS if name not in ("doctor", "step", "profile", "tests")])
def test_every_part_is_started_with_words_that_its_program_knows(monkeypatch, tmp_path, name, device):
    args = gpu_suite._parser().parse_args(["--out", str(tmp_path), "--device", device])
    args.limit = 60.0
    program, *words = PARTS[name].command(args, tmp_path / "out.json")
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, *given):
        parse(parser, *given)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(ParsedError):
        importlib.import_module(program).main()


def test_what_tunes_for_minutes_has_a_part_of_its_own(tmp_path):
    args = gpu_suite._parser().parse_args(["--out", str(tmp_path)])
    words = {name: PARTS[name].command(args, tmp_path) for name in ("kernels", "autotune")}
    slow = ["compile max-autotune", "compile max-autotune, CUDA graphs", "quack"]
    assert words["kernels"][-4:] == ["--without", *slow]
    assert words["autotune"][-5:] == ["--contenders", "iwm-fast triton", *slow]


def test_the_baselines_end_before_they_are_killed(parts, tmp_path, monkeypatch):
    """A compile is given up early enough to write a row that says so."""
    words = parts(peers="well")
    started = []
    command = PARTS["peers"].command
    told = gpu_suite.PARTS["peers"].command
    peers = Part(20.0, lambda args, file: started.append(command(args, file)) or told(args, file))
    monkeypatch.setattr(gpu_suite, "PARTS", {"peers": peers, "doctor": gpu_suite.PARTS["peers"]})
    assert gpu_suite.main([*words, "doctor", "--patience", "3"]) == 0
    ((_, *rest),) = started
    assert rest[rest.index("--until") + 1] == "51"


def test_the_table_to_be_copied_has_what_was_tuned_and_how_attention_was_timed(tmp_path):
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "A_GPU-triton-3.6.0.json").write_text('{"a product": {"choice": {}}}')
    timed = {"A_GPU": {"a key": {"choice": "varlen"}}}
    (tmp_path / "attention.json").write_text(json.dumps({"result": {"table": timed, "rows": []}}))
    gpu_suite._tuned(tmp_path)
    assert json.loads((tmp_path / "tuned.json").read_text()) == {
        "schema": "iwm-fast-tuned/1",
        "devices": {"A_GPU": {"a product": {"choice": {}}}},
        "attention": timed,
    }
