import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from iwm_fast.config import Config
from iwm_fast.engine import provenance
from iwm_fast.engine.metrics.log import MetricsLog
from iwm_fast.engine.run_directory import RunDirectory, run_config
from iwm_fast.errors import UserError
from iwm_fast.eval.report.report import read_metrics


def changed(config, section, **values):
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_a_second_live_job_is_refused_and_a_dead_one_is_not(tmp_path):
    code = (
        "import sys; from pathlib import Path; from iwm_fast.engine.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"pid {holder.pid}"), RunDirectory(tmp_path).locked():
        pass
    holder.kill()
    holder.wait()
    with RunDirectory(tmp_path).locked():
        pass


def test_only_what_does_not_change_the_training_may_differ_on_resume(tmp_path):
    run, config = RunDirectory(tmp_path), Config()
    run.begin(config, {})
    run.require_same(changed(changed(config, "zero", stage=3), "train", steps=7, micro_batch=2))
    with pytest.raises(UserError, match=r"train\.lr was 0\.001 .* 0\.002"):
        run.require_same(changed(config, "train", lr=2e-3))


def test_lines_after_the_checkpoint_and_torn_lines_are_dropped_and_the_rest_is_kept_byte_for_byte(tmp_path):
    run = RunDirectory(tmp_path)
    lines = [json.dumps({"step": s, "loss": s / 3}) + "\n" for s in (1, 5, 10, 12)]
    run.metrics_file.write_text("".join(lines) + '{"step": 13, "lo')
    run.drop_metrics_after(10)
    assert run.metrics_file.read_text() == "".join(lines[:3])


def test_unreadable_records_of_earlier_launches_are_not_lost(tmp_path, monkeypatch):
    file = tmp_path / "environment.json"
    file.write_text('{"starts": [{"step": 3}]}')
    assert provenance._earlier(file) == [{"step": 3}]

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"environment\.json: cannot be read \(Permission denied; check its owner"):
        provenance._earlier(file)


@pytest.mark.parametrize(
    "line",
    [b"5\n", b'{"loss": 1}\n', b"[]\n", b"\0\0\0\n", b'{"step": 2, "lo\n', b'{"step": "2"}\n', b"\xe9\n", b"\n"],
)
def test_a_line_of_the_metrics_that_cannot_be_read_takes_no_later_line_with_it(tmp_path, line):
    run = RunDirectory(tmp_path)
    one, three, four = (json.dumps({"step": step}).encode() + b"\n" for step in (1, 3, 4))
    run.metrics_file.write_bytes(one + line + three + four + line)
    run.drop_metrics_after(3)
    assert run.metrics_file.read_bytes() == one + line + three
    assert [record["step"] for record in read_metrics(run.metrics_file)] == [1, 3]


def test_metrics_of_a_run_that_begins_again_are_set_aside_and_none_is_lost(tmp_path, capfd):
    run = RunDirectory(tmp_path)
    for line in ('{"step": 1}\n{"step": 2}\n', '{"step": 1, "loss": 2}\n'):
        run.metrics_file.write_text(line)
        run.drop_metrics_after(0)
        assert "no checkpoint to resume from, so the run starts over" in capfd.readouterr().err
        assert not run.metrics_file.exists()
    assert run.metrics_before.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 1, "loss": 2}\n'
    run.metrics_file.touch()
    run.drop_metrics_after(0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("left", ["", "\n", "\0" * 512])
def test_an_empty_configuration_of_a_run_is_not_taken_for_its_settings(tmp_path, left):
    run = RunDirectory(tmp_path)
    run.config_file.write_text(left)
    for ask in (run.recorded, lambda: run.require_same(Config()), lambda: run_config(run.config_file, ["train.lr=1"])):
        with pytest.raises(UserError, match=r"config\.yaml: is empty, so .*: restore it, or remove"):
            ask()


def test_a_file_or_a_link_to_nowhere_in_the_run_s_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, what in (("file", "is a file"), ("link", "is a link to nowhere, which is not there")):
        with (
            pytest.raises(UserError, match=rf"{name}: {what}; choose another --out"),
            RunDirectory(tmp_path / name).locked(),
        ):
            pass


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"environment": {"torch": "2"}}', {"torch": "2"}),
        (None, "No such file or directory"),
        ('{"environment": ', "is damaged"),
        ("[]", "is of another kind"),
        ('{"environment": 5}', "is of another kind"),
    ],
)
def test_an_environment_that_is_not_recorded_is_said_in_its_place(tmp_path, text, found):
    file = tmp_path / "environment.json"
    if text is not None:
        file.write_text(text)
    known = provenance.recorded_environment(file)
    assert known == (found if isinstance(found, dict) else {"not known": f"{file}: {found}"})


def test_metrics_that_the_disk_loses_are_named(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def fail(_handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match=r"metrics\.jsonl: metrics cannot be written \(Input/output error; the disk"):
        log.sync()
    log.close()
