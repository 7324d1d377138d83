import errno
import fcntl
import os
import subprocess
import sys

import pytest

from iwm_fast import notices
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import UserError
from iwm_fast.file_locks import hold


@pytest.fixture
def refusing(monkeypatch):
    """Make every lock fail with an error number."""

    def refuse(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(notices, "_told", set())

    return refuse


NONE = ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK", "EINVAL", "EPERM", "EBADF", "ENOTTY"]


@pytest.mark.parametrize("name", NONE)
def test_a_file_system_without_locks_is_said_once_and_nothing_is_held(name, tmp_path, refusing, capsys):
    refusing(getattr(errno, name))
    with (tmp_path / "f").open("w") as file:
        assert [hold(file, "runs/a"), hold(file, "runs/a")] == [False, False]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("runs/a: its file system has no locks (")


@pytest.mark.parametrize("name", ["EAGAIN", "EACCES"])
def test_what_another_process_holds_is_not_taken_for_a_lack_of_locks(name, tmp_path, refusing):
    refusing(getattr(errno, name))
    with (tmp_path / "f").open("w") as file, pytest.raises(BlockingIOError):
        hold(file, "runs/a")


def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    code = "import sys; from iwm_fast.file_locks import hold; hold(open(sys.argv[1], 'a'), '')"
    with (tmp_path / "f").open("a") as file:
        assert hold(file, "f")
        other = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "f"], capture_output=True, text=True, check=False
        )
    assert "BlockingIOError" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "f"], check=False).returncode == 0


def test_runs_indexes_and_shards_are_written_without_locks(tmp_path, refusing, capsys):
    refusing(errno.ENOSYS)
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"x")
    with RunDirectory(tmp_path / "run").locked():
        pass
    assert write_index(root, tmp_path / "i.tsv")["samples"] == 1
    assert write_shards(root, tmp_path / "shards")["samples"] == 1
    assert capsys.readouterr().err.count("has no locks") == 3


def test_a_server_that_fails_is_not_another_job(tmp_path, refusing):
    refusing(errno.EIO)
    with (
        pytest.raises(UserError, match=r"run: cannot be locked \(Input/output error; the disk or its server fails"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        pass
