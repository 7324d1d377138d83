"""Standard streams of every kind: no text, terminal, pipe or closed stream may lose a program's results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import sys
from iwm_fast.programs import run_program
from iwm_fast.streams import open_streams

def work():
    print("0.5 ± 0.1 – 2 × \u2603 \udce9")
    print("done", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        assert file.fileno() > 2
        file.write("measured")

code = run_program("program", work)
open_streams()
sys.exit(code)
"""


def start(tmp_path, redirection="", **environment):
    """Return (exit code, stdout, stderr) of a program that prints and then writes a file, which must exist."""
    words = ["sh", "-c", f'exec "$0" -c "$1" "$2" {redirection}', sys.executable, PROGRAM, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, env=os.environ | environment, timeout=300, check=False)
    assert (tmp_path / "out").read_text() == "measured"
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8:strict", "0.5 ± 0.1 – 2 × ☃ \\xe9\n"),
        ("ascii", "0.5 +/- 0.1 - 2 x \\u2603 \\xe9\n"),
        ("ascii:strict", "0.5 +/- 0.1 - 2 x \\u2603 \\xe9\n"),
    ],
)
def test_every_text_is_shown_in_the_characters_that_there_are(encoding, shown, tmp_path):
    assert start(tmp_path, PYTHONIOENCODING=encoding) == (0, shown, "done\n")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_costs_nothing(redirection, tmp_path):
    code, out, err = start(tmp_path, redirection)
    assert code == 0
    assert bool(out) == (" >&-" not in f" {redirection}")
    assert bool(err) == ("2>&-" not in redirection)


def test_what_a_full_disk_cannot_take_goes_to_standard_error_with_a_line_and_exit_code_2(tmp_path):
    code, _, err = start(tmp_path, ">/dev/full", PYTHONIOENCODING="utf-8")
    assert code == 2
    assert sorted(err.splitlines()) == [
        "0.5 ± 0.1 – 2 × ☃ \\xe9",
        "done",
        "program: standard output: No space left on device; the rest went to standard error",
    ]


@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_a_reader_who_has_seen_enough_ends_nothing(redirection, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    words = ["sh", "-c", f'exec "$0" -c "$1" "$2" {redirection}', sys.executable, PROGRAM, str(tmp_path / "out")]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, timeout=300, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"" if redirection else b"done\n")
    assert (tmp_path / "out").read_text() == "measured"
