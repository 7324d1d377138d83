"""RUN/kernel_choices.json: one table of block sizes for all ranks, reused on resume."""

from __future__ import annotations

import json

import pytest
import torch
from launched import on_ranks
from small_run import losses, state

from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.kernel_choices import KernelChoices, read_tables
from iwm_fast.errors import UserError
from iwm_fast.kernels import Adopted
from iwm_fast.kernels._choices import run_choices as _run_choices
from iwm_fast.kernels._tuning.candidates import LIBRARY, candidates_of
from iwm_fast.kernels._tuning.tuner import Tuner

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
KEY = "hidden float32-highest 64x48x32 any row"
ORDER = candidates_of("sm_90", "hidden")
SAVED = {"A_GPU": {KEY: Adopted(LIBRARY, 4)}, "OTHER": {KEY: Adopted(ORDER[1])}}


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A kind of device on which the last candidate is the fastest."""
    seconds = iter(range(1000, 0, -1))
    tuner = Tuner("A_GPU", "sm_90", 10**9, tmp_path / "machine", lambda _: float(next(seconds)))
    monkeypatch.setattr(_run_choices, "device_tuner", lambda _: tuner)


def ask(choices, step):
    choices.choices.begin(step)
    return choices.choices.run("hidden", torch.float32, (50, 48, 32), lambda choice: choice, "any row")


def saved_file(folder):
    """Write a run's file with SAVED in it."""
    file = folder / "kernel_choices.json"
    devices = {name: {key: a.document() for key, a in table.items()} for name, table in SAVED.items()}
    file.write_text(json.dumps({"schema": "iwm-fast-kernel-choices/1", "devices": devices}))
    return file


@pytest.mark.usefixtures("device")
def test_what_a_run_finds_is_in_its_file_before_a_step_uses_it(tmp_path):
    file = tmp_path / "kernel_choices.json"
    choices = KernelChoices(ALONE, file, read_tables(file, None))
    first = ask(choices, 1)
    assert not file.exists()
    assert choices.choices.lacking
    choices.meet(2)
    assert read_tables(file, None) == {"A_GPU": {KEY: Adopted(LIBRARY, 2)}}
    again = KernelChoices(ALONE, file, read_tables(file, None))
    assert [ask(again, step) for step in (1, 2, 3)] == [first, LIBRARY, LIBRARY]
    assert not again.choices.lacking
    assert first != LIBRARY


@pytest.mark.usefixtures("device")
def test_other_kinds_of_devices_stay_in_the_file(tmp_path):
    file = saved_file(tmp_path)
    choices = KernelChoices(ALONE, file, read_tables(file, None))
    choices.choices.run("hidden", torch.float32, (500, 48, 32), lambda choice: choice, "any row")
    choices.meet(6)
    found = read_tables(file, None)
    assert found["OTHER"] == SAVED["OTHER"]
    assert found["A_GPU"].items() > SAVED["A_GPU"].items()


@pytest.mark.usefixtures("device")
def test_on_resume_a_line_says_that_nothing_of_this_device_is_saved(tmp_path):
    file = tmp_path / "kernel_choices.json"
    for tables, words in (
        ({}, "no block sizes of A_GPU:"),
        ({"OTHER": SAVED["OTHER"]}, "no block sizes of A_GPU, only of OTHER:"),
    ):
        choices = KernelChoices(ALONE, file, tables)
        assert words in choices.news(3)
        assert choices.news(0) is None  # a new run
    assert KernelChoices(ALONE, file, SAVED).news(3) is None


def test_on_a_cpu_nothing_is_said_and_nothing_written(tmp_path):
    choices = KernelChoices(ALONE, tmp_path / "kernel_choices.json", {})
    ask(choices, 1)
    assert not choices.choices.lacking
    assert choices.news(3) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"schema": "iwm-fast-tuned/1", "devices": {}}', b"[" * 100_000],
    ids=["empty", "torn", "list", "no text", "no schema", "another schema", "deep"],
)
def test_a_damaged_file_is_said_and_set_aside(content, tmp_path, capsys):
    file = tmp_path / "kernel_choices.json"
    for number in ("", ".2"):
        file.write_bytes(content)
        assert read_tables(file, None) == {}
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert f"{file}: is damaged or of another kind, and kept in kernel_choices.damaged{number}.json" in said[0]
        assert (tmp_path / f"kernel_choices.damaged{number}.json").read_bytes() == content
    assert read_tables(file, None) == {}
    assert capsys.readouterr().err == ""


def test_of_a_file_with_damaged_entries_the_others_are_used(tmp_path, capsys):
    file = saved_file(tmp_path)
    document = json.loads(file.read_text())
    document["devices"]["A_GPU"] |= {"one": {"choice": 3}, "two": None}
    document["devices"]["THIRD"] = 7
    file.write_text(json.dumps(document))
    assert read_tables(file, None) == SAVED
    assert "3 damaged entries are left out, and kept in kernel_choices.damaged.json" in capsys.readouterr().err
    assert read_tables(file, None) == SAVED
    assert capsys.readouterr().err == ""


def test_a_run_that_starts_from_another_one_s_checkpoint_takes_its_choices(tmp_path, capsys):
    checkpoint = tmp_path / "other" / "checkpoints" / "step_000004"
    checkpoint.mkdir(parents=True)
    other, own = saved_file(tmp_path / "other"), tmp_path / "kernel_choices.json"
    assert read_tables(own, checkpoint) == SAVED
    other.write_text("{")
    assert read_tables(own, checkpoint) == {}
    assert f"{other}: is damaged or of another kind: block sizes" in capsys.readouterr().err
    assert other.read_text() == "{"  # another run's file stays unchanged
    assert list(tmp_path.glob("*.json")) == []
    saved_file(tmp_path)
    assert read_tables(own, checkpoint) == SAVED


@pytest.mark.usefixtures("device")
def test_a_file_that_cannot_be_written_is_said_in_one_line(tmp_path):
    choices = KernelChoices(ALONE, tmp_path / "gone" / "kernel_choices.json", {})
    ask(choices, 1)
    with pytest.raises(UserError, match=r"gone/kernel_choices\.json: cannot be written"):
        choices.meet(2)


@pytest.mark.slow  # Triton's interpreter on two ranks
def test_two_ranks_that_time_differently_train_alike_and_again_after_a_resume(tiny_images, tmp_path):
    """On devices where another candidate is the fastest on each rank and at each launch."""
    jobs = [
        {"name": "whole", "train__steps": 4, "fastest": [1, 2]},
        {"name": "halves", "train__steps": 2, "fastest": [1, 2]},
        {"name": "halves", "train__steps": 4, "fastest": [2, 0], "resume": "auto"},
        {"name": "other", "train__steps": 4, "fastest": [2, 1]},
    ]
    names = ("whole", "halves", "other")
    on_ranks(2, tiny_images, tmp_path, jobs, TRITON_INTERPRET="1")
    whole, halves, other = (read_tables(tmp_path / name / "kernel_choices.json", None) for name in names)
    assert {key.split()[0] for key in whole["A_GPU"]} >= {
        "hidden",
        "project",
        "plain",
        "hidden_backward",
        "weight_grad",
    }
    assert whole == halves
    assert whole != other
    for name in names:
        first, second = (json.loads((tmp_path / f"{name}.choices.{rank}.json").read_text()) for rank in range(2))
        both = first.keys() & second.keys()
        assert len(both) > 10
        assert all(first[key] == second[key] for key in both)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    one, two = (state(tmp_path / name, 4) for name in ("whole", "halves"))
    assert all(torch.equal(one[key], two[key]) for key in one)
