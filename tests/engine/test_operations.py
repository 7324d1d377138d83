"""Monitoring of a run: sums over ranks, stragglers, Prometheus, Weights & Biases, the recorded environment."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_run import metrics, small_config

from iwm_fast.engine import pretrain
from iwm_fast.engine.distributed.stragglers import Stragglers
from iwm_fast.engine.metrics.prometheus import PrometheusSink
from iwm_fast.errors import UserError

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def slow_run(tiny_images, tmp_path_factory):
    """Return (the run's folder, its output): two ranks, the second slow."""
    run = tmp_path_factory.mktemp("slow") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "slow_rank.py"), str(tiny_images), str(run), str(free_port())]
    paths = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return run, done.stderr


@pytest.mark.slow
def test_a_slow_rank_is_named_once_with_its_host(slow_run):
    run, said = slow_run
    named = [line for line in said.splitlines() if "keeps the others waiting" in line]
    assert len(named) == 1
    assert named[0].startswith("step 3: rank 1 on " + socket.gethostname())
    assert "300 s per step" in named[0]
    for record in metrics(run):
        assert record["slowest_rank"] == 1
        assert record["own_s_max"] == 300.0
        assert record["own_s"] == 200.0
        assert record["step_s_max"] >= record["step_s"] > 0
        # a mean over the ranks, whose own clocks may differ
        assert record["images_per_s"] >= 8 / record["step_s_max"] * (1 - 1e-9)


@pytest.mark.slow
def test_prometheus_serves_the_newest_record(slow_run):
    run, _ = slow_run
    lines = run.with_name("scraped.txt").read_text().splitlines()
    found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    record = next(r for r in metrics(run) if r["step"] == 4)  # scraped before the fifth was written
    assert found["iwm_fast_loss"] == record["loss"]
    assert found["iwm_fast_step"] == 4
    assert all(f"# TYPE {name} gauge" in lines for name in found)
    assert any(f'run="{run}"' in line for line in lines)


@pytest.mark.slow
def test_the_environment_says_how_to_repeat_the_run(slow_run):
    document = json.loads((slow_run[0] / "environment.json").read_text())
    (start,) = document["starts"]
    assert document["schema"] == "iwm-fast-environment/1"
    assert document["seed"] == document["config"]["train"]["seed"] == 3
    assert {"commit", "packages", "python"} <= document["environment"].keys()
    assert start["launcher"] == "torchrun"
    assert start["world"] == len(start["ranks"]) == 2
    assert [r["host"] for r in start["ranks"]] == [socket.gethostname()] * 2
    assert start["ranks"][0]["versions"]["torch"]
    assert [(link["source"], link["target"]) for link in start["interconnect"]["links"]] == [(1, 0), (0, 1)]
    assert [one["bytes"] for one in start["interconnect"]["all_reduce"]] == [4, 2**20, 2**24]


def log_entries(content: bytes):
    """Return the entries of a LevelDB log, the format of W&B's files, after seven bytes of its own header."""
    place, entry = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block is padding
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield entry
            entry = b""


def test_every_launch_is_recorded_and_weights_and_biases_gets_the_records(tiny_images, tmp_path, monkeypatch):
    """Offline, read back from its files; the resumed launch continues the same W&B run."""
    pytest.importorskip("wandb", reason="needs the wandb extra: pip install 'iwm-fast[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    for steps, resume in ((2, "never"), (4, "auto")):
        pretrain(small_config(tiny_images, train__steps=steps, log__wandb="iwm-test"), run, resume)
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [(start["step"], start["interconnect"]) for start in starts] == [(0, None), (2, None)]  # alone
    expected = {record["step"]: record["loss"] for record in metrics(run)}
    deadline = time.monotonic() + 300
    while sent_losses(run) != expected and time.monotonic() < deadline:
        time.sleep(0.2)  # W&B's own process writes the file, a little after the run has finished
    assert sent_losses(run) == expected
    assert len({file.stem for file in run.glob("wandb/offline-run-*/*.wandb")}) == 1


def sent_losses(run: Path) -> dict[int, float]:
    from wandb.proto import wandb_internal_pb2

    found = {}
    for file in run.glob("wandb/offline-run-*/*.wandb"):
        for data in log_entries(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss" in items:
                found[record.history.step.num] = json.loads(items["loss"])
    return found


def test_a_missing_wandb_is_one_clear_error(tiny_images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'iwm-fast\[wandb\]'"):
        pretrain(small_config(tiny_images, train__steps=1, log__wandb="x"), tmp_path / "run")


@pytest.mark.parametrize("port", [0, 9109])
def test_a_missing_prometheus_client_is_one_clear_error_before_the_first_step(port, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    said = r"^log\.prometheus_port is set, but .* pip install 'iwm-fast\[prometheus\]', or unset log\.prometheus_port$"
    with pytest.raises(UserError, match=said):
        pretrain(small_config(tiny_images, train__steps=1, log__prometheus_port=port), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# As this package wrote it before it used prometheus_client: names, types, labels and values stay.
WRITTEN_BEFORE = r"""# TYPE iwm_fast_step gauge
iwm_fast_step{run="a \"run\" in C:\\runs\n"} 12345678
# TYPE iwm_fast_loss gauge
iwm_fast_loss{run="a \"run\" in C:\\runs\n"} 0.10000000000000001
# TYPE iwm_fast_lr gauge
iwm_fast_lr{run="a \"run\" in C:\\runs\n"} 3.0000000000000001e-17
# TYPE iwm_fast_tokens gauge
iwm_fast_tokens{run="a \"run\" in C:\\runs\n"} -1.2345678901234567e+22
# TYPE iwm_fast_graphed gauge
iwm_fast_graphed{run="a \"run\" in C:\\runs\n"} 1
"""


def test_the_served_text_says_what_it_said_before_prometheus_client_wrote_it():
    record = {"step": 12345678, "loss": 0.1, "lr": 3e-17, "tokens": -1.2345678901234567e22, "graphed": True}
    sink = PrometheusSink("127.0.0.1", 0, 'a "run" in C:\\runs\n')
    try:
        sink.write({"step": 1, "gone": 2.0})
        sink.write({**record, "rank_me": None})
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        sink.close()
    families = list(text_string_to_metric_families(text))
    assert families == list(text_string_to_metric_families(WRITTEN_BEFORE))
    assert [(sample.value, sample.labels["run"]) for family in families for sample in family.samples] == [
        (value, 'a "run" in C:\\runs\n') for value in record.values()
    ]


def test_a_number_that_is_not_finite_is_left_out_and_other_paths_are_not_found():
    sink = PrometheusSink("127.0.0.1", 0, 'a "run"')
    try:
        sink.write({"step": 1, "loss": float("nan"), "lr": 0.5, "note": "text", "mfu": None})
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "loss" not in text
        assert 'iwm_fast_lr{run="a \\"run\\""} 0.5' in text
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/other", timeout=10)
        with pytest.raises(UserError, match=f"log.prometheus_port: 127.0.0.1:{sink.port} cannot be opened"):
            PrometheusSink("127.0.0.1", sink.port, "b")
    finally:
        sink.close()


def test_only_a_lasting_and_noticeable_delay_names_a_rank():
    watch = Stragglers(1.25)
    assert [watch.look([1.0, 2.0, 1.0], 3.0) for _ in range(2)] == [None, None]
    assert watch.look([1.0, 2.0, 1.0], 3.0) == {"rank": 1, "own_s": 2.0, "others_s": 1.0}
    assert watch.look([1.0, 2.0, 1.0], 3.0) is None  # said already
    assert watch.look([1.0, 1.0, 1.0], 3.0) is None
    for _ in range(5):
        assert watch.look([0.010, 0.014], 1.0) is None  # 4 ms of a second
    assert watch.look([7.0], 7.0) is None
