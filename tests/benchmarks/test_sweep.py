"""benchmarks.sweep: trainings that were interrupted, and folders of other trainings."""

import json
import threading
import time
from pathlib import Path
from statistics import stdev

import pytest
from scipy.stats import t as student

from iwm_fast.benchmarks import sweep
from iwm_fast.benchmarks.sweep import interval, run_jobs, run_one, train_all
from iwm_fast.errors import UserError
from iwm_fast.measure.continued import files_digest

TINY = [
    "model.encoder={depth: 1, width: 32, heads: 2}", "model.predictor.depth=1", "model.predictor.width=32",
    "train.global_batch=8", "train.warmup=1", "train.schedule_steps=6", "log.every_steps=1",
]  # fmt: skip


@pytest.mark.slow
def test_an_interrupted_training_is_resumed_and_one_of_other_settings_is_left_as_it_is(tiny_images, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / split).symlink_to(tiny_images, target_is_directory=True)
    words = ("demo.yaml", data, tmp_path / "run", 0)
    measure = ["--what", "knn"]
    run_one(*words, [*TINY, "train.steps=3"], measure)  # as if it had been stopped there
    resumed = run_one(*words, [*TINY, "train.steps=6"], measure)
    whole = run_one("demo.yaml", data, tmp_path / "whole", 0, [*TINY, "train.steps=6"], measure)
    assert (resumed["resumed"], whole["resumed"]) == (True, False)
    assert resumed["steps"] == whole["steps"] == 6
    for key in ("loss_last", "rank_me", "knn"):
        assert resumed["evaluation"][key] == whole["evaluation"][key]
    assert [line["loss"] for line in resumed["curve"] if "loss" in line] == [
        line["loss"] for line in whole["curve"] if "loss" in line
    ]
    with pytest.raises(UserError, match="pretrain ended with exit code 2"):
        run_one(*words, [*TINY, "train.steps=6", "train.lr=0.5"], measure)
    assert "train.lr" in capfd.readouterr().err


@pytest.fixture
def trained(monkeypatch):
    """Stand in for the two commands: an evaluation that names its data, with numbers that hold dots."""
    done = []

    def command(name, *words):
        if name == "pretrain":
            run = Path(words[words.index("--out") + 1])
            run.mkdir(parents=True)
            line = {"step": 6, "loss": 0.5, "rank_me": 7.25}
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            done.append(run.name)
            return 1.0
        data = words[words.index("--data") + 1]
        found = {
            "mrr": 1.25,
            "bank": 16.5,
            "report": "x",
            "splits": {"test": f"{data}/test", "said": f"test on {data}/test."},
        }
        Path(words[words.index("--json") + 1]).write_text(json.dumps(found))
        return 0.0

    monkeypatch.setattr(sweep, "run_iwm", command)
    return done


def some_data(folder):
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.jpg").write_bytes(folder.name.encode())
    return folder


def test_a_folder_is_named_by_its_last_part_and_numbers_stay(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(some_data(tmp_path / "photos"))
    found = run_one("demo.yaml", Path(), tmp_path / "run", 0, [], [])["evaluation"]
    assert (found["mrr"], found["bank"]) == (1.25, 16.5)
    assert found["splits"] == {"test": "photos/test", "said": "test on photos/test."}


def test_a_table_is_of_one_set_of_images_and_has_each_seed_once(trained, tmp_path):
    one, other = some_data(tmp_path / "a"), some_data(tmp_path / "longer")
    words = {"config": "demo.yaml", "out": tmp_path / "runs", "common": [], "measure": []}
    words |= {"json_file": tmp_path / "s.json"}
    train_all([{"name": "x", "overrides": [], "runs": []}], data=one, seeds=[0, 1], **words)
    train_all([{"name": "x", "overrides": [], "runs": []}], data=one, seeds=[0, 1, 2], **words)
    assert trained == ["x_0", "x_1", "x_2"]
    with pytest.raises(UserError, match=r"s\.json: measured on other data"):
        train_all([{"name": "x", "overrides": [], "runs": []}], data=other, seeds=[0], **words)
    with pytest.raises(UserError, match="--seeds: 3 is given twice"):
        train_all([{"name": "x", "overrides": [], "runs": []}], data=one, seeds=[3, 3], **words)
    both = [{"name": name, "overrides": [], "runs": []} for name in ("a b", "a_b")]
    with pytest.raises(UserError, match="variants' folders: a_b is given twice"):
        train_all(both, data=one, seeds=[3], **words)
    assert len(trained) == 3


def test_a_digest_is_of_names_and_sizes_wherever_the_files_lie(tmp_path):
    first, same = some_data(tmp_path / "one" / "a"), some_data(tmp_path / "two" / "a")
    (tmp_path / "link").symlink_to(first)
    assert files_digest(first) == files_digest(same) == files_digest(tmp_path / "link")
    (same / "train" / "a.jpg").rename(same / "train" / "b.jpg")
    assert files_digest(first) != files_digest(same)


@pytest.mark.parametrize("count", [2, 3, 10, 11, 12, 40, 1000])
def test_intervals_have_student_s_quantile(count):
    values = [float(place % 7) for place in range(count)]
    expected = student.ppf(0.975, count - 1) * stdev(values) / count**0.5
    assert interval(values)["half_width"] == pytest.approx(expected, rel=2e-4)


def test_jobs_run_at_once_and_after_a_failure_no_other_starts():
    both = threading.Barrier(2)
    run_jobs(both.wait, [(60,), (60,)], 2)  # one at a time would wait for the other in vain
    started = []

    def fail_at_first(place):
        started.append(place)
        if place == 0:
            raise UserError("no such run")
        time.sleep(0.05)  # one or two may have begun before the failure was seen

    with pytest.raises(UserError, match="no such run"):
        run_jobs(fail_at_first, [(place,) for place in range(100)], 1)
    assert len(started) < 100
