"""The command line under users' launchers, and its reaction to a scheduler's signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_run import BASE, losses, metrics, state

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "alone": [sys.executable, "-m", "iwm_fast"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "iwm_fast",
    ],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29611", "--module", "iwm_fast"],
}


def environment():
    # The deepspeed launcher starts "python3" by name.
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_images):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(BASE | {"data": BASE["data"] | {"root": str(tiny_images)}}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_train_as_one_process_does(launcher, config, tmp_path):
    for name in ("alone", launcher):
        command = [
            *LAUNCHERS[name],
            "pretrain",
            str(config),
            "train.steps=4",
            "zero.stage=2",
            "--out",
            str(tmp_path / name),
        ]
        done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / launcher) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_ends_with_zero(config, tmp_path):
    run = tmp_path / "run"
    command = [*LAUNCHERS["alone"], "pretrain", str(config), "train.schedule_steps=100000", "--out", str(run)]
    job = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.stderr.read()[-3000:]
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said[-3000:]
    last = metrics(run)[-1]["step"]
    assert state(run, last)
    assert "--resume auto" in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_writes_a_checkpoint_under_every_launcher(launcher, config, tmp_path):
    """As a terminal sends it: to the launcher and to its processes in the same group."""
    run = tmp_path / "run"
    command = [*LAUNCHERS[launcher], "pretrain", str(config), "train.schedule_steps=100000", "--out", str(run)]
    job = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.stderr.read()[-3000:]
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=300)
    assert state(run, metrics(run)[-1]["step"])
    assert said.count("interrupted after step") == 1
    assert f"resume with: iwm-fast pretrain --out {run} --resume auto" in said
    if launcher == "alone":
        assert job.returncode == 130
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_second_launch_on_the_same_run_is_refused_in_one_line(config, tmp_path):
    command = [*LAUNCHERS["alone"], "pretrain", str(config), "train.steps=1", "--out", str(tmp_path / "run")]
    assert subprocess.run(command, env=environment(), capture_output=True, timeout=600, check=False).returncode == 0
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1
    assert "--resume auto" in again.stderr
