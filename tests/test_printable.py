from __future__ import annotations

import pytest

from iwm_fast.console import print_table
from iwm_fast.printable import printable


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
