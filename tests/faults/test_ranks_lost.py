"""Two ranks started by hand, without a launcher that would clean up: one is paused, killed or asked to stop."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_run import BASE, losses, metrics, state

SOAK = Path(__file__).parent / "soak.py"
# Seconds that a rank may be silent in a step, and the limit for all to end; one that hangs does for 600.
TIMEOUT_S, ENDED_WITHIN_S = 10.0, 240.0


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_images):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    tree = BASE | {"data": BASE["data"] | {"root": str(tiny_images), "wait_s": 1.0}}
    tree["train"] = BASE["train"] | {"schedule_steps": 100_000, "rank_timeout_s": TIMEOUT_S}
    tree["zero"] = {"stage": 2}
    path.write_text(yaml.safe_dump(tree))
    return path


_PROGRAM = """
import sys, time
from iwm_fast.cli.main import main
from iwm_fast.engine.step import Trainer

plain = Trainer._forward
Trainer._forward = lambda self, batch: time.sleep(600) if self.step == 2 else plain(self, batch)
sys.exit(main(sys.argv[1:]))
"""
HANGS = ("-c", _PROGRAM)


class TwoRanks:
    """Both processes, with the output of each."""

    def __init__(self, config, run, *words, second=("-m", "iwm_fast")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = ["pretrain", str(config), "--out", str(run), *words]
        self.run = run
        self.ranks = []
        for rank, program in (("0", ("-m", "iwm_fast")), ("1", second)):
            command = [sys.executable, *program, *words]
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            self.ranks.append(subprocess.Popen(command, env=os.environ | place, stderr=subprocess.PIPE, text=True))

    def until_step(self, step):
        deadline = time.monotonic() + 300
        while not (self.run / "metrics.jsonl").exists() or not (made := metrics(self.run)) or made[-1]["step"] < step:
            assert time.monotonic() < deadline
            if any(rank.poll() is not None for rank in self.ranks):
                self.kill()  # the other may wait for it for minutes
                pytest.fail(str([rank.communicate()[1][-2000:] for rank in self.ranks]))
            time.sleep(0.02)

    def end(self, rank):
        """(exit code, standard error)."""
        _, said = self.ranks[rank].communicate(timeout=ENDED_WITHIN_S)
        return self.ranks[rank].returncode, said

    def kill(self):
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()

    def close(self):
        self.kill()
        for rank in self.ranks:
            rank.wait()
            rank.stderr.close()


@pytest.fixture
def started():
    jobs = []

    def start(*words, **programs):
        jobs.append(TwoRanks(*words, **programs))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def said_of(rank, job, expected):
    """Return the last line of the first rank, which must say ``expected`` of ``rank`` and blame nobody else."""
    code, said = job.end(0)
    assert code in (1, 2), said
    assert "Traceback" not in said
    line = next(line for line in said.splitlines() if line.startswith("iwm-fast: "))
    assert f"rank {rank} (host {socket.gethostname()}, pid {job.ranks[rank].pid}, last seen in" in line
    assert expected in line
    assert "--resume auto" in line
    assert line.count("(host ") == 1
    return line


def test_a_signal_to_one_rank_stops_both_and_a_killed_one_is_named(config, started, tmp_path):
    run = tmp_path / "run"
    job = started(config, run)
    job.until_step(3)
    job.ranks[1].send_signal(signal.SIGUSR1)
    ends = [job.end(0), job.end(1)]
    assert [code for code, _ in ends] == [0, 0], ends
    last = metrics(run)[-1]["step"]
    assert state(run, last)
    kept = (run / "metrics.jsonl").read_bytes()

    job = started(config, run, "--resume", "auto")
    job.until_step(last + 2)
    job.ranks[1].kill()
    said_of(1, job, "is gone or stopped")
    assert (run / "metrics.jsonl").read_bytes().startswith(kept)
    assert metrics(run)[last]["step"] == last + 1


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_within_the_timeout_and_is_named(started, config, tmp_path):
    """Its third forward pass does not end: the process lives, and its heartbeat continues."""
    job = started(config, tmp_path / "run", second=HANGS)
    job.until_step(2)
    line = said_of(1, job, "hangs")
    assert "last seen in forward of step 3" in line
    code, said = job.end(1)  # it reports itself, too
    assert code == 1
    assert "rank 1 (host" in said


@pytest.mark.skipif(not os.environ.get("IWM_FAST_FAULTS"), reason="a third start; IWM_FAST_FAULTS=1 runs it")
def test_a_stopped_rank_is_named_by_the_other(config, started, tmp_path):
    job = started(config, tmp_path / "run")
    job.until_step(2)
    job.ranks[1].send_signal(signal.SIGSTOP)
    said_of(1, job, "is gone or stopped")
    job.ranks[1].send_signal(signal.SIGCONT)  # it wakes up alone, and says so
    code, said = job.end(1)
    assert code != 0
    assert "iwm-fast: " in said


@pytest.mark.skipif(not os.environ.get("IWM_FAST_FAULTS"), reason="a fourth start; IWM_FAST_FAULTS=1 runs it")
def test_a_stopped_first_rank_is_named_though_it_holds_the_rendezvous(config, started, tmp_path):
    job = started(config, tmp_path / "run")
    job.until_step(2)
    job.ranks[0].send_signal(signal.SIGSTOP)
    code, said = job.end(1)
    assert code == 1
    assert "rank 0, which holds the rendezvous at 127.0.0.1:" in said


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
    """The short form of the soak; benchmarks/results/soak_cpu.json has a hundred."""
    command = [sys.executable, str(SOAK), "--out", str(tmp_path / "soak"), "--kills", "3", "--steps", "12"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert losses(tmp_path / "soak/killed") == losses(tmp_path / "soak/straight")
