"""Results as JSON: whether they can be written is checked before the work, and they are never lost if they cannot."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import sys

import pytest

from iwm_fast import results
from iwm_fast.atomic_files import write_whole_text
from iwm_fast.errors import UserError
from iwm_fast.outputs import require_file, require_folder, require_new_folder, require_result
from iwm_fast.results import give_result, json_text, write_result

NAME = os.fsdecode(b"caf\xe9.png")


def test_a_name_that_is_no_utf8_is_an_escape_and_reads_back_as_its_bytes(tmp_path, capsys):
    write_result(tmp_path / "r.json", "test", {"file": NAME, "rows": {NAME: 1}})
    text = (tmp_path / "r.json").read_text(encoding="utf-8")  # valid UTF-8
    assert '"caf\\udce9.png"' in text
    found = json.loads(text)
    assert os.fsencode(found["file"]) == b"caf\xe9.png"
    assert list(found["rows"]) == [NAME]
    write_result("-", "test", {"file": NAME})
    assert json.loads(capsys.readouterr().out)["file"] == NAME


def test_json_on_an_ascii_terminal_is_still_json(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    write_result("-", "test", {"name": "é – ±"})
    terminal.flush()
    assert json.loads(terminal.buffer.getvalue())["name"] == "é – ±"


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_file_cannot_take_is_shown_and_printed_before_the_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "write_whole_text", full)
    with pytest.raises(UserError, match=r"r\.json: cannot be written: No space left on device; the JSON went to"):
        give_result(str(tmp_path / "r.json"), "test", {"knn": 0.5}, lambda: print("THE TABLE"))
    document, table = capsys.readouterr().out.split("THE TABLE")
    assert json.loads(document)["knn"] == 0.5
    assert table == "\n"


def test_the_file_is_there_before_anything_is_shown(tmp_path):
    shown = []
    give_result(str(tmp_path / "r.json"), "test", {}, lambda: shown.append((tmp_path / "r.json").exists()))
    assert shown == [True]
    give_result("-", "test", {}, lambda: shown.append("a table amid the JSON"))
    assert shown == [True]


def test_numbers_that_json_does_not_have_are_null():
    assert json.loads(json_text({"a": [float("nan"), float("inf"), 1.5]})) == {"a": [None, None, 1.5]}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", r"--json: .*folder: is a folder; name a file"),
        ("file/r.json", r"--json: .*r\.json: cannot be written: Not a directory; name another file"),
        ("file/deep/r.json", "Not a directory"),
        ("n" * 255, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name, words, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=words):
        require_result(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_asking_leaves_nothing_and_touches_nothing(tmp_path):
    (tmp_path / "r.json").write_text("older")
    require_file(tmp_path / "r.json", "--json")
    require_file(tmp_path / "new" / "folder" / "r.json", "--json")
    require_folder(tmp_path / "new")
    require_new_folder(tmp_path / "new")
    require_result("-")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "older"


def test_a_folder_that_is_there_is_no_new_one(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for name in (".", "link"):
        with pytest.raises(UserError, match="exists already; choose another --out"):
            require_new_folder(tmp_path / name)


def test_a_closed_standard_output_is_refused_where_it_is_to_take_the_answer(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UserError, match="standard output is closed; name a file"):
        require_result("-")


def test_a_link_keeps_pointing_at_its_file(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "r.json").symlink_to("kept/real.json")
    for text in ("one", "two"):
        write_whole_text(tmp_path / "r.json", text)
        assert (tmp_path / "r.json").is_symlink()
        assert (tmp_path / "kept" / "real.json").read_text() == text


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    require_file(tmp_path / "pipe", "--json")
    write_whole_text(tmp_path / "pipe", "text")
    assert os.read(reading, 9) == b"text"
    os.close(reading)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_could_not_be_written_leaves_the_older_file_and_no_other(tmp_path, monkeypatch):
    write_whole_text(tmp_path / "r.json", "older")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole_text(tmp_path / "r.json", "newer")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r.json", "older")]
