"""Kill a training repeatedly, let it resume, and compare its result with that of an undisturbed run.

    python tests/faults/soak.py --out DIR [--kills 100] [--steps 300] [--stage 2] [--seed 0] [--launcher warm|torchrun]
                                [--json FILE]

Two ranks under torchrun train a two-layer model. ``torchrun`` starts its command line each time; ``warm`` forks
torchrun's agent, and the agent the ranks, from a process that has imported everything, which saves most of a launch.

SIGKILL goes to the launcher and both ranks together, to the launcher alone or to one rank alone, at random instants:
during startup, during a step, while a checkpoint is written, between its rename and the update of ``latest``. Instants
are found from outside, by watching the run's folder; the engine knows nothing of this program. After every kill all
processes must end by themselves within a minute, and the next launch must resume at the checkpoint's next step with the
earlier lines of metrics.jsonl unchanged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_run import BASE, losses, state
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import iwm_fast.engine  # noqa: F401  (what a start imports, before the forks)
from iwm_fast.cli import main as cli
from iwm_fast.data.views.pipeline import _decoder
from iwm_fast.log_filters import quiet_third_parties
from iwm_fast.results import write_result

GONE_WITHIN_S = 60.0
STARTED_WITHIN_S = 240.0
VICTIMS = ("all", "launcher", "rank 0", "rank 1")
INSTANTS = ("start", "step", "writing", "before latest")
BANNER = "global batch"  # in the line with which a launch begins
ANNOUNCED = re.compile(r"soak: rank (\d) is pid (\d+)")
RESUMED = re.compile(r"the next step is (\d+) of")


@dataclass
class Kill:
    """One kill: which processes, when, how long the rest took to end, and the step at which the next launch resumed."""

    victim: str
    instant: str
    checkpoint: int
    gone_after_s: float
    next_step: int | None = None


class Job:
    """A launcher and its two ranks."""

    def __init__(self, config: Path, run: Path, log: Path, *, warm: bool) -> None:
        self.run, self.warm, self._log = run, warm, log.open("ab+")
        self._begin = self._log.tell()
        words = ["pretrain", str(config), "--out", str(run), "--resume", "auto"]
        self.launcher = (_Forked if warm else _torchrun)(words, self._log)
        self.ranks: list[int] = []
        self._resumed_after: int | None = None
        self._resumes = _newest(run) > 0

    def trains(self) -> bool:
        """Return whether this launch has made a step; it drops later lines of earlier ones from metrics.jsonl first."""
        if self._resumed_after is None:
            said = self.said()
            match = RESUMED.search(said)
            if match is None and (self._resumes or BANNER not in said):
                return False
            self._resumed_after = int(match[1]) - 1 if match else 0
        return _logged(self.run) > self._resumed_after

    def find_ranks(self) -> bool:
        """Find the ranks' process ids; return whether both exist."""
        if len(self.ranks) < 2 and self.warm:
            self.ranks = [int(pid) for _, pid in sorted(ANNOUNCED.findall(self.said()))]
        elif len(self.ranks) < 2:
            self.ranks = sorted(_ranks_of(self.launcher.pid), key=_rank_of)
        return len(self.ranks) == 2

    def kill(self, victim: str) -> None:
        """Send SIGKILL to all selected processes at once."""
        self.find_ranks()
        pids = {"all": [self.launcher.pid, *self.ranks], "launcher": [self.launcher.pid]}
        pids |= {f"rank {r}": [pid] for r, pid in enumerate(self.ranks)}
        for pid in pids.get(victim, pids["all"]):  # the whole job if that rank has not started yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_gone(self) -> float:
        """Return seconds until the last process ended by itself; raise RuntimeError if that takes too long."""
        begin = time.monotonic()
        while self.launcher.poll() is None or any(_alive(pid) for pid in self._others()):
            if time.monotonic() - begin > GONE_WITHIN_S:
                raise RuntimeError(f"still alive {GONE_WITHIN_S:g} s after the kill:\n{self.said()[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - begin

    def _others(self) -> list[int]:
        """Return every process of the job except the launcher, also those that started after it died."""
        self.find_ranks()
        return [*self.ranks, *(_of_session(self.launcher.pid) if self.warm else [])]

    def said(self) -> str:
        """Return the output of the launcher and its ranks."""
        self._log.seek(self._begin)
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """Kill whatever is left of it."""
        if self.launcher.poll() is None:
            self.kill("all")
            self.launcher.wait()
        self._log.close()


def _torchrun(words: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen([*command, "-m", "iwm_fast", *words], stdout=output, stderr=output)


class _Forked:
    """torchrun's agent in a fork of this process, with the parts of Popen that this program needs."""

    def __init__(self, words: list[str], output: IO[bytes]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            launch = LaunchConfig(
                1, 1, 2, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                max_restarts=0, start_method="fork", monitor_interval=0.1,
            )  # fmt: skip
            elastic_launch(launch, _rank)(words)
            code = 0
        except ChildFailedError as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = GONE_WITHIN_S) -> int:
        limit = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("the launcher", timeout)
            time.sleep(0.05)
        return code


def _warm() -> None:
    """Import and compile everything that a launch needs, so that forks have it; no thread may start here."""
    import deepspeed.runtime.zero.muon.original_muon
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    # Not built: that would start DALI's threads.
    _decoder("cpu", "image_slice", batch_size=2, num_threads=1, device_id=None)
    deepspeed.ops.__compatible_ops__  # noqa: B018  (found out on the first look)


def _rank(words: list[str]) -> None:
    print(f"soak: rank {os.environ['RANK']} is pid {os.getpid()}", file=sys.stderr, flush=True)
    sys.exit(cli.main(words))


def soak(out: Path, kills: int, steps: int, stage: int, seed: int, *, warm: bool) -> list[Kill]:
    """Run to the end through ``kills`` kills; raise AssertionError if anything differs from the undisturbed run."""
    out.mkdir(parents=True)
    config = write_config(out, steps, stage)
    with _job(config, out / "straight", out / "straight.log", warm) as job:
        begin = time.monotonic()
        _until(job, job.trains)
        start_s = time.monotonic() - begin
        assert job.launcher.wait(600) == 0, job.said()[-3000:]
    draw, done = random.Random(seed), []
    run = out / "killed"
    for number in range(kills):
        kept = run / "metrics.jsonl"
        before = kept.read_bytes() if kept.exists() else b""
        with _job(config, run, out / "killed.log", warm) as job:
            kill = _one(job, draw, ahead=_latest(run) > steps * number / kills, start_s=start_s)
            _check_resumed(kill, before, kept, job.said())
        done.append(kill)
        print(f"kill {number + 1}/{kills}: {asdict(kill)}", flush=True)
    with _job(config, run, out / "killed.log", warm) as job:
        assert job.launcher.wait(600) == 0, job.said()[-3000:]
    assert losses(run) == losses(out / "straight")
    straight, killed = state(out / "straight", steps), state(run, steps)
    assert straight.keys() == killed.keys()
    different = [key for key in straight if not torch.equal(straight[key], killed[key])]
    assert not different, different
    hidden = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    assert not hidden, hidden
    return done


def write_config(out: Path, steps: int, stage: int) -> Path:
    """Write twelve small images and the configuration of a run on them."""
    noise = np.random.default_rng(0)
    (out / "images").mkdir()
    for i in range(12):
        colour = noise.integers(0, 255, 3) * np.linspace(0.3, 1, 24)[:, None, None]
        pixels = np.broadcast_to(colour, (24, 24, 3)) + noise.normal(0, 10, (24, 24, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out / f"images/{i:02d}.jpg")
    tree = json.loads(json.dumps(BASE))
    tree["model"] |= {"image": 16, "patch": 4, "predictor": {"depth": 1, "width": 32, "heads": 2}}
    tree["data"]["root"] = str(out / "images")
    tree["train"] |= {"global_batch": 4, "schedule_steps": steps}
    tree["zero"]["stage"] = stage
    tree["checkpoint"] = {"every_steps": 2, "keep_last": 2}
    path = out / "soak.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _one(job: Job, draw: random.Random, *, ahead: bool, start_s: float) -> Kill:
    """Wait for the random instant and kill. A run that is ahead of its share of steps is killed during startup."""
    victim = draw.choice(VICTIMS)
    instant = "start" if ahead else draw.choice(INSTANTS)
    if instant == "start":
        until = time.monotonic() + draw.uniform(0.0, start_s)
        _until(job, lambda: time.monotonic() >= until)
    else:
        _until(job, job.trains)
        if instant == "step":
            until = time.monotonic() + draw.uniform(0.0, 0.2)
            _until(job, lambda: time.monotonic() >= until)
        elif instant == "writing":
            _until(job, lambda: any((job.run / "checkpoints").glob(".step_*.partial")))
        else:
            _until(job, lambda: _newest(job.run) > _latest(job.run))
    job.kill(victim)
    gone = job.wait_gone()
    return Kill(victim, instant, _latest(job.run), round(gone, 2))


def _check_resumed(kill: Kill, before: bytes, kept: Path, said: str) -> None:
    """Check what this launch, before it was killed, did with the metrics of the earlier ones."""
    match = RESUMED.search(said)
    if match is None:
        return
    kill.next_step = int(match[1])
    after = kept.read_bytes()
    earlier = b"".join(_lines(before, below=kill.next_step))
    assert after.startswith(earlier), "earlier lines of metrics.jsonl changed"
    new = [json.loads(line)["step"] for line in after[len(earlier) :].splitlines(keepends=True) if line.endswith(b"\n")]
    assert new == list(range(kill.next_step, kill.next_step + len(new))), (kill, new)


def _lines(content: bytes, below: int) -> list[bytes]:
    whole = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return [line for line in whole if json.loads(line)["step"] < below]


@contextlib.contextmanager
def _job(config: Path, run: Path, log: Path, warm: bool) -> Iterator[Job]:
    job = Job(config, run, log, warm=warm)
    try:
        yield job
    finally:
        job.close()


def _until(job: Job, condition) -> None:
    """Poll until a condition holds or the job has ended by itself."""
    limit = time.monotonic() + STARTED_WITHIN_S
    while not condition() and job.launcher.poll() is None:
        job.find_ranks()
        if time.monotonic() > limit:
            raise RuntimeError(f"no such instant within {STARTED_WITHIN_S:g} s:\n{job.said()[-3000:]}")
        time.sleep(0.001)


def _logged(run: Path) -> int:
    """Return the last step in metrics.jsonl."""
    try:
        lines = _lines((run / "metrics.jsonl").read_bytes(), below=1 << 62)
    except OSError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def _latest(run: Path) -> int:
    try:
        return int((run / "checkpoints/latest").read_text().removeprefix("step_"))
    except OSError:
        return 0


def _newest(run: Path) -> int:
    return max((int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*")), default=0)


def _of_session(leader: int) -> list[int]:
    """Return the processes in the session of ``leader``, without itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found.append(int(entry.name))
    return found


def _ranks_of(pid: int) -> list[int]:
    """Return the child processes of a launcher that have a RANK; it may have others."""
    try:
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [child for child in found if _rank_of(child) >= 0]


def _rank_of(pid: int) -> int:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return -1
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), -1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=["warm", "torchrun"], default="warm")
    parser.add_argument("--json")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    quiet_third_parties()
    if asked.launcher == "warm":
        _warm()
    begin = time.monotonic()
    kills = soak(asked.out, asked.kills, asked.steps, asked.stage, asked.seed, warm=asked.launcher == "warm")
    resumed = [kill for kill in kills if kill.next_step is not None]
    figures = {
        "kills": len(kills),
        "steps": asked.steps,
        "stage": asked.stage,
        "seed": asked.seed,
        "launcher": asked.launcher,
        "weights_equal_bit_for_bit": True,  # soak has raised otherwise
        "losses_equal": True,
        "starts_that_resumed": len(resumed),
        "seconds": round(time.monotonic() - begin, 1),
        "each": [list(asdict(kill).values()) for kill in kills],
        "each_is": list(asdict(kills[0])) if kills else [],
    }
    if asked.json:
        write_result(asked.json, "soak", figures)
    print({key: value for key, value in figures.items() if key != "each"})


if __name__ == "__main__":
    main()
