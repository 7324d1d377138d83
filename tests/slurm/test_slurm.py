"""The batch script under a real SLURM: two nodes on this machine; a stopped run is requeued and resumes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_run import BASE, losses, metrics, small_config

from iwm_fast.engine import pretrain

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 60

pytestmark = [
    pytest.mark.skipif(not os.environ.get("IWM_TEST_SLURM"), reason="set IWM_TEST_SLURM=1: starts SLURM, minutes"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start munge and SLURM"),
    pytest.mark.skipif(
        not all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")),
        reason="needs apt-get install slurm-wlm munge",
    ),
]


@pytest.fixture
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(["sh", HERE / "start_cluster.sh", folder], text=True, capture_output=True, check=False)
    try:
        assert started.returncode == 0, started.stderr
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run(["sh", HERE / "stop_cluster.sh", folder], check=False)


def ask(environment, *command):
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout.strip()


def wait_for(condition, seconds, said):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.5)


def test_a_stopped_job_is_requeued_and_resumes_to_its_end(cluster, tiny_images, tmp_path):
    config, run, output = tmp_path / "small.yaml", tmp_path / "run", tmp_path / "out.txt"
    tree = BASE | {"data": BASE["data"] | {"root": str(tiny_images)}}
    tree["train"] = BASE["train"] | {"schedule_steps": STEPS}
    config.write_text(yaml.safe_dump(tree))
    environment = cluster | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",  # the nodes of this cluster have no names of their own
    }
    job = ask(
        environment, "sbatch", "--parsable", "--nodes", "2", "--ntasks-per-node", "1", "--output", str(output),
        str(ROOT / "configs/slurm/pretrain.sbatch"), str(run), str(config), "zero.stage=2",
    )  # fmt: skip

    def said():
        return output.read_text()[-5000:] if output.exists() else ask(environment, "scontrol", "show", "job", job)

    def field(name):
        return ask(environment, "scontrol", "show", "job", job).split(f"{name}=")[1].split()[0]

    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3, 240, said)
    ask(environment, "scancel", "--signal=USR1", job)
    wait_for(lambda: field("Restarts") == "1", 120, said)
    assert (run / "stopped").exists()
    stopped_at = len(metrics(run))
    assert stopped_at < STEPS
    wait_for(lambda: field("JobState") != "COMPLETING", 120, said)
    ask(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM lets a requeued job wait
    wait_for(lambda: field("JobState") == "COMPLETED", 300, said)
    assert not (run / "stopped").exists()
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    assert f"the next step is {stopped_at + 1} of {STEPS}" in output.read_text()
    pretrain(small_config(tiny_images, train__schedule_steps=STEPS), tmp_path / "alone")
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
