"""Signals before, during and after a training's loop."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from small_run import metrics, small_config, state

from iwm_fast.cli import demo as demo_module
from iwm_fast.cli.main import main
from iwm_fast.engine import pretrain
from iwm_fast.engine import step as loop
from iwm_fast.engine.distributed import signals
from iwm_fast.engine.distributed.signals import INTERRUPTED, Abandoned, StopRequest
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import Interrupted, UserError
from iwm_fast.eval import online
from iwm_fast.eval.online import OnlineEvaluator


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_stay_as_they_were():
    """Restore handlers, and use the default ones during a test: nohup and background jobs ignore some."""
    found = {number: signal.signal(number, signal.SIG_DFL) for number in StopRequest.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in StopRequest.SIGNALS} == before
    for number, handler in found.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", StopRequest.SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_while_there_is_something_to_save(number):
    with StopRequest() as stop, stop.held(lambda _: None):
        assert not stop.asked
        send(number)
        assert stop.asked
        assert stop.interrupted is (number == signal.SIGINT)


def test_the_first_ctrl_c_is_reported_and_the_second_ends(monkeypatch):
    said, now = [], [0.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopRequest() as stop, stop.held(said.append, "iwm-fast pretrain --out a --resume auto"):
        send(signal.SIGINT)
        send(signal.SIGINT)  # launcher and terminal both forward one key press
        assert stop.interrupted
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert said == ["interrupted: stopping with a checkpoint; Ctrl-C again ends at once, without one"]
        now[0] += 1.5 * signals._SAME_PRESS_S
        with pytest.raises(KeyboardInterrupt, match=r"are lost, resume with: iwm-fast pretrain --out a --resume auto$"):
            send(signal.SIGINT)


def test_ctrl_c_before_the_loop_is_an_interruption():
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_that_was_ignored_from_the_beginning_stays_ignored(number):
    """As under nohup, and in a background job of a script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stop.held(lambda _: None):
            send(number)
            assert not stop.asked
    finally:
        signal.signal(number, before)


def test_work_that_need_not_be_finished_is_broken_off_and_not_begun_again():
    with StopRequest() as stop, stop.held(lambda _: None):
        with pytest.raises(Abandoned), stop.abandonable():
            send(signal.SIGTERM)
        with pytest.raises(Abandoned), stop.abandonable():
            pytest.fail("begun though the process is to stop")


PROGRAM = """
import ctypes, importlib.util, signal, sys
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals._GRACE_S = 0.2
signal.signal(signal.SIGINT, signal.default_int_handler)

def stuck():
    words = ["in\\n"]
    while True:
        try:
            while words:
                sys.stdout.write(words.pop())
                sys.stdout.flush()
            ctypes.CDLL(None).sleep(60)
        except KeyboardInterrupt:
            pass

with signals.StopRequest() as stop:
    if sys.argv[2] == "start":
        stuck()
    with stop.held(lambda line: print(line, flush=True), "iwm-fast pretrain --out a --resume auto"):
        stuck()
"""


@pytest.mark.parametrize("phase", ["start", "held"])
def test_a_main_thread_that_does_not_come_back_from_a_library_is_ended(phase):
    """At the start by the first Ctrl-C, later by the second."""
    command = [sys.executable, "-c", PROGRAM, signals.__file__, phase]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "in\n"
        job.send_signal(signal.SIGINT)
        if phase == "held":
            assert job.stdout.readline().startswith("interrupted: stopping with a checkpoint")
            time.sleep(2 * signals._SAME_PRESS_S)
            job.send_signal(signal.SIGINT)
        _, said = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == INTERRUPTED
    assert said.startswith("iwm-fast: interrupted")
    assert said.count("\n") == 1
    assert ("resume with: iwm-fast pretrain --out a --resume auto\n" in said) is (phase == "held")


def at_step(monkeypatch, step, number):
    """Send a signal in the forward pass of a step."""
    plain = loop.Trainer._forward

    def forward(trainer, batch):
        if trainer.step + 1 == step:
            send(number)
        return plain(trainer, batch)

    monkeypatch.setattr(loop.Trainer, "_forward", forward)


def test_ctrl_c_in_a_step_saves_it_and_says_how_to_resume(tiny_images, tmp_path, monkeypatch, capfd):
    run, config = tmp_path / "run", small_config(tiny_images)
    at_step(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(Interrupted):
        pretrain(config, run)
    assert [record["step"] for record in metrics(run)] == [1, 2, 3]
    assert state(run, 3)
    assert RunDirectory(run).stopped_file.exists()
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        f"interrupted after step 3, checkpoint {run}/checkpoints/step_000003; "
        f"resume with: iwm-fast pretrain --out {run} --resume auto"
    )
    assert main(["pretrain", "train.steps=4", "--out", str(run), "--resume", "auto"]) == 0
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_a_wait_for_data_is_broken_off_and_the_step_before_it_is_saved(number, tiny_images, tmp_path, monkeypatch):
    """With two micro-batches per step, the second of which never comes."""
    plain = loop.TrainingStream.__next__
    asked = []

    def late(stream):
        asked.append(None)
        if len(asked) == 6:
            send(number)
            time.sleep(60)
        return plain(stream)

    monkeypatch.setattr(loop.TrainingStream, "__next__", late)
    run, config = tmp_path / "run", small_config(tiny_images, train__micro_batch=4)
    if number == signal.SIGINT:
        with pytest.raises(Interrupted):
            pretrain(config, run)
    else:
        pretrain(config, run)
    assert [record["step"] for record in metrics(run)] == [1, 2]
    assert state(run, 2)
    pretrain(small_config(tiny_images, train__micro_batch=4, train__steps=4), run, "auto")
    straight = tmp_path / "straight"
    pretrain(small_config(tiny_images, train__micro_batch=4, train__steps=4), straight)
    assert [record["loss"] for record in metrics(run)] == [record["loss"] for record in metrics(straight)]


def test_an_evaluation_is_broken_off_and_a_checkpoint_written(tiny_images, tmp_path, monkeypatch):
    def measure(*_, **__):
        send(signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(online, "measure_share", measure)
    run = tmp_path / "run"
    config = small_config(tiny_images, eval__every_steps=2, eval__root=str(tiny_images))
    with pytest.raises(Interrupted):
        pretrain(config, run, evaluator=OnlineEvaluator())
    assert [record["step"] for record in metrics(run)] == [1, 2]
    assert state(run, 2)


@pytest.mark.slow
def test_an_evaluation_is_not_begun_by_a_run_that_is_to_stop(tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr(OnlineEvaluator, "measure", lambda *_: pytest.fail("begun"))
    at_step(monkeypatch, 2, signal.SIGTERM)
    config = small_config(tiny_images, eval__every_steps=2, eval__root=str(tiny_images))
    pretrain(config, tmp_path / "run", evaluator=OnlineEvaluator())
    assert state(tmp_path / "run", 2)


def test_before_the_first_step_there_is_nothing_to_save(tiny_images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loop.TrainingStream, "__next__", lambda _: send(signal.SIGINT) or time.sleep(60))
    with pytest.raises(Interrupted):
        pretrain(small_config(tiny_images), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert "interrupted before the first step: there is nothing to save" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["evaluate", "r", "--data", "d"], ["finetune", "r", "--data", "d"]])
def test_ctrl_c_in_other_commands_is_one_line(command, monkeypatch, capsys):
    from iwm_fast.eval import run
    from iwm_fast.eval.finetune import run as finetune

    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "opened", press)
    monkeypatch.setattr(finetune, "chosen_checkpoint", press)
    assert main(command) == INTERRUPTED
    assert capsys.readouterr().err == "iwm-fast: interrupted\n"


def test_a_stopped_demo_does_not_evaluate(tmp_path, monkeypatch):
    def stopped(_config, out, *_, **__):
        out.mkdir(exist_ok=True)
        RunDirectory(out).mark_stopped(3)

    monkeypatch.setattr(demo_module, "draw_dataset", lambda *_, **__: None)
    monkeypatch.setattr(demo_module, "pretrain", stopped)
    monkeypatch.setattr(demo_module, "evaluate_run", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(UserError, match="stopped early"):
        demo_module.demo(tmp_path / "demo")
