"""What commands print fits the terminal, or 100 columns where there is none."""

from __future__ import annotations

import re
import sys
from functools import partial

import pytest

from iwm_fast.cli.main import main
from iwm_fast.cli.plan import planner_of
from iwm_fast.console import PIPED_WIDTH, print_table


def test_a_word_that_is_wider_than_the_table_stays_whole(capsys):
    print_table("title", ("a", "b"), [("x" * 200, "[red]y"), ("z", "")])
    assert capsys.readouterr().out.splitlines() == ["title", f"a{' ' * 199}  b", f"{'x' * 200}  [red]y", "z"]


@pytest.mark.parametrize(("width", "terminal"), [(PIPED_WIDTH, False), (100, True), (80, True)])
@pytest.mark.parametrize(
    "words",
    [
        ["config", "--schema"],
        ["plan", "vit_base_p16_224_equi.yaml", "train.warmup_epochs=40", "--data-rate", "3000"],
        ["plan", "vit_large_p16_224.yaml", "--nodes", "16", "--gpu", "a100-40gb"],
    ],
    ids=" ".join,
)
def test_no_line_is_wider_than_the_terminal_or_a_hundred_columns(words, width, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("iwm_fast.cli.plan.planner_of", partial(planner_of, images=64))
    main(words)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert len(out.splitlines()) > 10
    assert [line for line in out.splitlines() if len(line) > width] == []


def test_a_table_is_narrowed_at_its_widest_columns_and_wrapped_at_spaces(capsys):
    print_table("title", ("file", "reason"), [("a/" + "x" * 60 + ".png", "word " * 20), ("b.png", "short")])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6].rstrip() for line in lines] == ["title", "file", "a/xxxx", *[""] * (len(lines) - 4), "b.png"]
    assert " ".join(line[68:].strip() for line in lines[2:-1]) == ("word " * 20).strip()
    assert max(map(len, lines)) <= PIPED_WIDTH
