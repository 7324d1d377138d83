"""What a training needs later is checked before its first step, and a failing evaluation loses no step."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import urllib.request

import pytest
from made_images import write_images
from small_run import losses, metrics, small_config

import iwm_fast
from iwm_fast.engine import pretrain, readiness
from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.metrics.loggers import open_sinks
from iwm_fast.engine.readiness import require_ready
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import UserError
from iwm_fast.eval import online
from iwm_fast.eval.online import OnlineEvaluator
from iwm_fast.export.weights import export_run

EVALUATED = {"train__steps": 4, "eval__every_steps": 3, "eval__mrr_images": 2, "eval__bank": 4}


def started(run):
    return (run / "metrics.jsonl").exists() or (run / "config.yaml").exists()


@pytest.mark.parametrize("root", ["no_such", "file", "empty"])
def test_images_to_evaluate_on_that_are_not_there_are_refused_before_the_first_step(root, tiny_images, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    config = small_config(tiny_images, **EVALUATED, eval__root=str(tmp_path / root))
    with pytest.raises(UserError, match=rf"^eval\.root: .*{root}"):
        pretrain(config, tmp_path / "run", evaluator=OnlineEvaluator())
    assert not started(tmp_path / "run")


def test_splits_that_are_ambiguous_or_differ_are_refused_before_the_first_step(tiny_images, tmp_path):
    root = tmp_path / "set"
    config = small_config(tiny_images, **EVALUATED, eval__root=str(root))
    directory = readiness.RunDirectory(tmp_path / "run")
    shutil.copytree(tiny_images, root / "Train")
    with pytest.raises(UserError, match=r"^eval\.root: .*set holds Train/ and no test/ or val/"):
        readiness.require_ready(config, directory, OnlineEvaluator())
    shutil.copytree(tiny_images, root / "val")
    readiness.require_ready(config, directory, OnlineEvaluator())
    (root / "val" / "warm").rename(root / "val" / "other")
    with pytest.raises(UserError, match=r"^eval\.root: .*/val has no image of 1 of the 2 classes of .*Train \(warm\)"):
        readiness.require_ready(config, directory, OnlineEvaluator())


def test_evaluation_that_nobody_gives_is_refused_and_not_left_out(tiny_images, tmp_path):
    config = small_config(tiny_images, **EVALUATED, eval__root=str(tiny_images))
    with pytest.raises(ValueError, match=r"^eval\.every_steps is 3 and evaluator is None"):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_that_allow_no_knn_are_said_before_the_first_step(tiny_images, tmp_path, capfd):
    write_images(tmp_path / "flat", 6)
    config = small_config(tiny_images, **EVALUATED, eval__root=str(tmp_path / "flat"))
    readiness.require_ready(config, readiness.RunDirectory(tmp_path / "run"), OnlineEvaluator())
    assert "eval.root: k-NN does not run during training: the images have no classes" in capfd.readouterr().err


def test_a_port_that_is_taken_is_refused_before_the_first_step(tiny_images, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"log\.prometheus_port: 127\.0\.0\.1:{port} cannot be opened"):
            pretrain(small_config(tiny_images, log__prometheus_port=port), tmp_path / "run")
    assert not started(tmp_path / "run")


def test_a_folder_of_the_run_that_cannot_be_written_is_refused_before_the_first_step(tiny_images, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match=r"run/tensorboard: cannot be written: Not a directory; fix the folder"):
        pretrain(small_config(tiny_images, log__tensorboard=True), tmp_path / "run")
    assert not started(tmp_path / "run")


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(tiny_images, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"run/checkpoints: a checkpoint takes \S+ GB and 1e-06 GB are free"):
        pretrain(small_config(tiny_images, train__steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_required_room_is_the_size_of_a_checkpoint(tiny_images, tmp_path, monkeypatch):
    config = small_config(tiny_images, train__steps=1)
    pretrain(config, tmp_path / "run")
    saved = checkpoint.Checkpoint(tmp_path / "run" / "checkpoints" / "step_000001")
    taken = (saved.path / "rank_00000.safetensors").stat().st_size
    asked = []
    usage = type("Usage", (), {"free": property(lambda _: asked.append(0) or 0)})
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda _: usage())
    with pytest.raises(UserError, match="a checkpoint takes") as refused:
        pretrain(config, tmp_path / "other")
    said = float(str(refused.value).split("takes ")[1].split(" GB")[0]) * 1e9
    assert 0.9 * taken < said <= taken


def vanished(*_, **__):
    raise UserError("photos: no such folder")


def broken(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


def buggy(*_, **__):
    raise RuntimeError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (vanished, "photos: no such folder"),
        (broken, r"rank 0: OSError: \[Errno 5\] Input/output error"),
        (buggy, "rank 0: RuntimeError: no kernel for this"),
    ],
)
def test_an_evaluation_that_fails_loses_no_step(fault, words, tiny_images, tmp_path, monkeypatch):
    config = small_config(tiny_images, **EVALUATED, eval__root=str(tiny_images))
    with monkeypatch.context() as patched:
        patched.setattr(online, "measure_share", fault)
        said = rf"^evaluation after step 3: {words} \(.*step_000003 is written; resume with --resume auto\)$"
        with pytest.raises(UserError, match=said):
            pretrain(config, tmp_path / "run", evaluator=OnlineEvaluator())
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3]
    assert checkpoint.damage(tmp_path / "run" / "checkpoints" / "step_000003") is None
    if fault is vanished:
        pretrain(config, tmp_path / "run", "auto", evaluator=OnlineEvaluator())
        pretrain(small_config(tiny_images, train__steps=4), tmp_path / "unbroken")
        assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")


def test_a_run_whose_name_is_no_utf8_has_its_metrics_everywhere(tiny_images, tmp_path):
    run = tmp_path / os.fsdecode(b"caf\xe9")
    config = small_config(tiny_images, log__tensorboard=True, log__prometheus_port=free_port())
    sinks = open_sinks(config, run, run / "tensorboard", 1)
    for sink in sinks:
        sink.write({"step": 1, "loss": 0.5})
    text = urllib.request.urlopen(f"http://127.0.0.1:{config.log.prometheus_port}/metrics", timeout=9).read().decode()
    for sink in sinks:
        sink.close()
    assert "caf\\\\udce9" in text
    (events,) = (run / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_a_run_whose_name_is_no_utf8_resumes_and_is_exported(tiny_images, tmp_path):
    run, out = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9", b"th\xe9"))
    pretrain(small_config(tiny_images, train__steps=1), run)
    pretrain(small_config(tiny_images, train__steps=2), run, "auto")
    assert [record["step"] for record in metrics(run)] == [1, 2]
    export_run(run, out)
    assert iwm_fast.load(out).step == 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("key", "other"), [("data.root", {}), ("eval.root", {"eval__every_steps": 1})])
def test_a_run_does_not_lie_among_the_images(tiny_images, tmp_path, key, other):
    roots = {"data.root": tmp_path / "others", "eval.root": None} | {key: tiny_images}
    config = small_config(roots["data.root"], **({"eval__root": str(tiny_images)} | other if other else {}))
    with pytest.raises(UserError, match=f"--out: .*is {key} too"):
        require_ready(config, RunDirectory(tiny_images), OnlineEvaluator())
