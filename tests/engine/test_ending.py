"""The commands that a training ends with can be typed as they are."""

import shlex

import pytest

from iwm_fast.config import load_config, packaged_config
from iwm_fast.engine.ending import Ending, resume_command


def ending(out, root, *overrides):
    config = load_config(packaged_config("vit_tiny_p4_32.yaml"), [f"data.root={root}", *overrides])
    return Ending(config, out, 7, 7, first=True)


def data_of(found):
    words = shlex.split(next(line for line in found.lines() if line.startswith("next: ")))
    assert words[1:4] == ["iwm-fast", "evaluate", str(found.out)]
    assert words[4] == "--data"
    return words[5]


@pytest.mark.parametrize(
    ("folders", "root", "data"),
    [
        (["photos/train/a", "photos/test/a"], "photos/train", "photos"),
        (["my photos/train/a", "my photos/val/a"], "my photos/train", "my photos"),
        (["photos/train/a", "photos/test/a"], "photos", "photos"),
        (["photos/a", "photos/b"], "photos", "photos"),
        (["photos/a", "other/train/a", "other/test/a"], "photos", "photos"),
        (["photos/train/a"], "photos/train", "photos/train"),
    ],
)
def test_evaluate_gets_the_data_that_the_run_had_with_its_test_part(tmp_path, folders, root, data):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").touch()
    assert data_of(ending(tmp_path / "runs" / "a b", tmp_path / root)) == str(tmp_path / data)


def test_evaluate_gets_eval_root_where_the_run_had_one(tmp_path):
    assert data_of(ending(tmp_path / "run", tmp_path / "x", f"eval.root={tmp_path / 'y'}")) == str(tmp_path / "y")


def test_results_are_named_and_the_export_goes_to_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = ending(tmp_path / "a", tmp_path)
    assert f"checkpoint: {tmp_path}/a/checkpoints/step_000007" in found.lines()
    assert f"metrics: {tmp_path}/a/metrics.jsonl" in found.lines()
    assert found.lines()[-1] == f"weights: iwm-fast export {tmp_path}/a --out weights/a"
    (tmp_path / "weights" / "a").mkdir(parents=True)
    assert found.lines()[-1].endswith("--out weights/a-step7")


def test_the_command_that_resumes_is_quoted_and_names_the_launcher_of_several_ranks(tmp_path):
    command = resume_command(tmp_path / "a b", 1)
    assert shlex.split(command) == ["iwm-fast", "pretrain", "--out", str(tmp_path / "a b"), "--resume", "auto"]
    assert resume_command(tmp_path, 2).endswith("(under the launcher that started this run)")
