"""A run when a gradient is not finite, the disk is full, or its data goes away."""

import contextlib
import json
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch
from made_images import write_images
from poisoned import poison
from small_run import losses, metrics, small_config, state

from iwm_fast.actions.space import ActionSpace
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.order import SampleOrder
from iwm_fast.data.sources import outage
from iwm_fast.engine import pretrain
from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.engine.nonfinite import SkippedSteps
from iwm_fast.errors import UserError


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_nan_gradients_changes_nothing_and_the_run_continues(
    stage, precision, tiny_images, tmp_path, monkeypatch
):
    poison(monkeypatch, {3, 4})
    config = small_config(
        tiny_images, train__steps=6, zero__stage=stage, train__precision=precision, train__max_skipped=2,
        checkpoint__every_steps=1, checkpoint__keep_last=9,
    )  # fmt: skip
    pretrain(config, tmp_path / "run")
    assert [r["skipped_in_a_row"] for r in metrics(tmp_path / "run")] == [0, 0, 1, 2, 0, 0]
    before, after, later = (state(tmp_path / "run", step) for step in (2, 4, 6))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(later[key], after[key]) for key in after)
    assert all(torch.isfinite(tensor).all() for tensor in later.values())
    updates = [checkpoint.Checkpoint(tmp_path / f"run/checkpoints/step_{step:06d}").updates for step in (2, 4, 6)]
    assert updates == [2, 2, 4]


def test_without_a_run_s_folder_no_file_of_samples_is_named():
    skipped = SkippedSteps(0, None, start(alone=True))
    skipped.note(torch.ones(()), 7, [0], [3])
    with pytest.raises(UserError) as told:
        skipped.read()
    assert str(told.value) == (
        "step 7: loss or gradient not finite in 1 steps in a row; lower train.lr, set train.clip"
    )


def test_too_many_skipped_steps_end_the_run_with_a_dump_of_their_samples(tiny_images, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4, 5})
    config = small_config(tiny_images, train__max_skipped=2)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row; .*skipped_steps\.json has the sample ids"):
        pretrain(config, tmp_path / "run")
    dump = json.loads((tmp_path / "run/skipped_steps.json").read_text())
    order = SampleOrder(config.train.seed, 24)
    for entry, step in zip(dump["steps"], (2, 3, 4), strict=True):
        ids, epochs = order(8 * (step - 1), 8 * step)
        assert entry == {
            "step": step,
            "samples": [list(pair) for pair in zip(epochs.tolist(), ids.tolist(), strict=True)],
        }


@pytest.fixture
def little_disk(tmp_path):
    """Mount a file system of two megabytes; a checkpoint of the small run takes a third of that."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_whole_checkpoints_only(little_disk, tiny_images, tmp_path):
    run = little_disk / "run"
    every = {"checkpoint__every_steps": 2, "checkpoint__keep_last": 9}
    with pytest.raises(UserError, match=r"No space left on device.*--resume auto") as caught:
        pretrain(small_config(tiny_images, **every), run)
    assert "\n" not in str(caught.value)
    checkpoints = sorted(run.glob("checkpoints/step_*"))
    assert checkpoints
    assert [checkpoint.damage(path) for path in checkpoints] == [None] * len(checkpoints)
    assert not list(run.glob("checkpoints/.step_*"))
    whole = checkpoint.newest(run / "checkpoints")[0]
    assert whole == checkpoints[-1]
    moved = tmp_path / "elsewhere"  # with room, it resumes as if nothing had happened
    shutil.copytree(run, moved)
    pretrain(small_config(tiny_images, **every), moved, resume="auto")
    pretrain(small_config(tiny_images, **every), tmp_path / "straight")
    assert losses(moved) == losses(tmp_path / "straight")


def test_metrics_that_cannot_be_written_end_the_run_in_one_line(little_disk, tiny_images):
    run = little_disk / "run"
    pretrain(small_config(tiny_images, train__steps=2), run)
    with (little_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with pytest.raises(UserError, match="No space left on device"):
        pretrain(small_config(tiny_images, train__steps=4), run, resume="auto")
    assert [r["step"] for r in metrics(run)] == [1, 2]


def batches(stream, count):
    return [(batch.ids.tolist(), batch.source.clone()) for batch, _ in zip(stream, range(count), strict=False)]


def test_a_data_folder_that_comes_back_is_waited_for(tmp_path, capfd):
    root, away = tmp_path / "images", tmp_path / "away"
    write_images(root / "a", 12)
    config = small_config(root, data__wait_s=60.0)
    space = ActionSpace(config.actions.groups, config.actions.form)
    files = list_images(root)
    with TrainingStream(config, files, space) as stream:
        undisturbed = batches(stream, 3)
    root.rename(away)
    back = threading.Timer(1.0, lambda: away.rename(root))
    back.start()
    with TrainingStream(config, files, space, run_dir=tmp_path) as stream:
        disturbed = batches(stream, 3)
        assert stream.bad == 0
    back.join()
    assert [ids for ids, _ in disturbed] == [ids for ids, _ in undisturbed]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(disturbed, undisturbed, strict=True))
    said = capfd.readouterr().err
    assert said.count("waiting up to 60 s") == 1
    assert str(root) in said
    assert not (tmp_path / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("how", ["moved", "unmounted"])
def test_a_data_folder_that_stays_away_is_named_after_the_wait(how, tmp_path, monkeypatch):
    root = tmp_path / "images"
    write_images(root / "a", 12)
    config = small_config(root, data__wait_s=0.4)
    files = list_images(root)
    shutil.rmtree(root)
    if how == "unmounted":
        root.mkdir()
    looks = []

    def look():
        """A clock that advances by a tenth of a second at each reading."""
        looks.append(None)
        return len(looks) / 10

    monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=look))
    with (
        TrainingStream(config, files, ActionSpace(config.actions.groups, config.actions.form)) as stream,
        pytest.raises(UserError, match=rf"{root}.* within 0.4 s"),
    ):
        next(stream)
    assert len(looks) == 5  # when the wait began, and after each time that the file was missing


def test_one_missing_file_is_a_bad_sample_without_a_wait(tmp_path, capfd):
    paths = write_images(tmp_path / "images", 200)
    config = small_config(tmp_path / "images", data__wait_s=60.0)
    files = list_images(tmp_path / "images")
    paths[0].unlink()
    with TrainingStream(config, files, ActionSpace(config.actions.groups, config.actions.form)) as stream:
        batches(stream, 25)
        assert stream.bad == 1
    assert "waiting" not in capfd.readouterr().err


def test_a_wait_for_data_as_long_as_a_rank_may_be_silent_is_refused(tiny_images):
    with pytest.raises(ValueError, match=r"data\.wait_s is 300; it must be below train\.rank_timeout_s \(60\)"):
        small_config(tiny_images, train__rank_timeout_s=60.0)
