"""Names of files and classes on terminals, in tables, in JSON and for libraries that accept UTF-8 only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from iwm_fast.console import print_table
from iwm_fast.file_names import printable, utf8_name, valid_unicode


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name", "plain name"),
        ("ünï 😀 日本", "ünï 😀 日本"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x7f\x85\u2028\u202e", "\\x7f\\x85\\u2028\\u202e"),
        (b"caf\xe9".decode(errors="surrogateescape"), "caf\\xe9"),
        ("", ""),
    ],
)
def test_a_text_is_one_line_without_control_characters(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_a_row_of_a_table_is_a_line_whatever_its_cells_hold(capsys):
    print_table("title", ("name", "value"), [("a\nb", "1"), ("\x1b[2Jc", "2")])
    assert capsys.readouterr().out.splitlines() == ["title", "name      value", "a\\nb      1", "\\x1b[2Jc  2"]


def test_a_name_for_a_library_leads_to_the_file_whatever_its_folder_is_called(tmp_path):
    plain, other = tmp_path / "plain", tmp_path / os.fsdecode(b"caf\xe9")
    for folder in (plain, other):
        folder.mkdir()
        with utf8_name(folder / "weights") as name:
            name.encode()  # as a library does
            Path(name).write_text("here")
        assert (folder / "weights").read_text() == "here"


def test_text_in_valid_unicode_is_read_back_by_json_as_the_same_name():
    name = os.fsdecode(b"caf\xe9/\xc3\xa9")
    assert json.loads(f'"{valid_unicode(name)}"') == name
    assert valid_unicode("caf\u00e9") == "caf\u00e9"
