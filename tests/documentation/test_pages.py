"""The generated pages of docs/reference/ are what the code says, and what they are made of is seen."""

from __future__ import annotations

import pytest

from iwm_fast.config.schema_table import rows
from tools.documentation.command_line import page as command_line
from tools.documentation.configuration import page as configuration
from tools.documentation.markdown import table
from tools.documentation.pages import PAGES, REFERENCE, write
from tools.documentation.python_interface import page as python_interface


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_what_the_code_says(name):
    committed = (REFERENCE / name).read_text(encoding="utf-8")
    assert committed == PAGES[name](), f"docs/reference/{name} is old: run python -m tools.documentation"


def test_every_key_is_on_its_page_with_what_it_may_be():
    page = configuration()
    missing = [row.key for row in rows() if f"| `{row.key}` | `{row.default}` | {row.allowed} |" not in page]
    assert not missing
    assert "## model.predictor\n" in page


@pytest.mark.parametrize(
    "line",
    [
        "## data index",
        "iwm-fast pretrain --out RUN [CONFIG] [KEY.PATH=VALUE...] [OPTIONS]",
        "| `--nodes` | whole number, 1 or more | `1` | Hosts. |",
        "| `--out` | `RUN` | required | The run's folder. |",
        r"| `--resume` | `auto\|never\|PATH` | `never` |",
        "iwm-fast pretrain --out runs/a --resume auto\n```",
    ],
)
def test_commands_are_shown_with_what_they_take(line):
    assert line in command_line()


@pytest.mark.parametrize("line", ["### predict", "world.device -> torch.device", "## Inferred", "checkpoint: str ="])
def test_the_python_interface_is_shown_with_its_types(line):
    page = python_interface()
    assert line in page
    assert page.count("```") % 2 == 0


def test_one_command_writes_all_pages(tmp_path):
    assert [path.name for path in write(tmp_path)] == list(PAGES)
    assert (tmp_path / "python.md").read_text(encoding="utf-8") == python_interface()


def test_a_cell_stays_one_cell():
    assert table(("a", "b"), [("x|y", "one\n two")])[-1] == r"| x\|y | one two |"
