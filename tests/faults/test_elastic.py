"""Two hosts, simulated by two torchrun agents of one elastic job: one is lost, the other continues alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from small_run import BASE, losses, metrics, small_config

from iwm_fast.engine import pretrain

pytestmark = pytest.mark.skipif(
    not os.environ.get("IWM_FAST_FAULTS"), reason="the rendezvous takes a minute; IWM_FAST_FAULTS=1 runs it"
)
STEPS, LOST_AT = 300, 20


def agent(config, run, port):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command += ["--rdzv-id", "elastic", "--local-addr", "127.0.0.1"]
    command += ["--rdzv-conf", "is_host=false,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"]
    command += ["-m", "iwm_fast", "pretrain", str(config), "--out", str(run), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_job_that_loses_a_host_resumes_on_the_other(tiny_images, tmp_path):
    run, config = tmp_path / "run", tmp_path / "elastic.yaml"
    tree = json.loads(json.dumps(BASE))
    tree["data"]["root"] = str(tiny_images)
    tree["train"]["schedule_steps"] = STEPS
    tree["checkpoint"]["every_steps"] = 5
    tree["zero"]["stage"] = 2
    config.write_text(yaml.safe_dump(tree))
    rendezvous = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on neither of the hosts
    staying, leaving = (agent(config, run, rendezvous.port) for _ in range(2))
    try:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or not (made := metrics(run)) or made[-1]["step"] < LOST_AT:
            assert time.monotonic() < deadline
            assert staying.poll() is None
            time.sleep(0.05)
        for pid in (*children(leaving.pid), leaving.pid):  # the host is gone: agent and rank at once
            os.kill(pid, signal.SIGKILL)
        _, said = staying.communicate(timeout=400)
        assert staying.returncode == 0, said[-3000:]
        assert "2 rank(s)" in said
        assert "1 rank(s)" in said
        assert "the next step is" in said
    finally:
        for job in (staying, leaving):
            if job.poll() is None:
                job.kill()
            job.communicate()
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    pretrain(small_config(tiny_images, train__schedule_steps=STEPS, zero__stage=2), tmp_path / "straight")
    # Rounding errors grow along a trajectory; compare the part around the loss of the host.
    assert losses(run)[: 3 * LOST_AT] == pytest.approx(losses(tmp_path / "straight")[: 3 * LOST_AT], rel=1e-3)
