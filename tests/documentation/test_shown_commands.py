"""Commands that documents show can be typed: options exist, arguments parse, keys are in the schema."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer._click.exceptions import UsageError
from typer.main import get_command

from iwm_fast.cli.main import app
from iwm_fast.config.schema_table import rows

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
)
COMMAND = get_command(app)
KEYS = {row.key for row in rows()}
SECTIONS = {key.rpartition(".")[0] for key in KEYS}
FIRST = sorted({key.partition(".")[0] for key in KEYS})
STARTS = re.compile(r"(?:^|\s)(?:\S*/)?(?:iwm-fast|-m iwm_fast)\s+(.*)")


def shell_lines(text):
    """Lines of the shell in fenced blocks, those that go on joined, without their comments."""
    for block in re.findall(r"(?ms)^ *```sh\n(.*?)^ *```", text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield from re.split(r"\s(?:&&|\|\|?|;)\s", re.sub(r"(^|\s)#.*", "", line))


def commands(text):
    """The words after `iwm-fast` of every command."""
    for line in shell_lines(text):
        found = STARTS.search(line)
        if found:
            yield shlex.split(re.split(r"\s(?:\d?>|<)", found[1])[0])


def problem(words):
    """What is wrong with a command, or None. Values are parsed; nothing runs."""
    command = COMMAND
    words = [word for word in words if word != "--debug"]
    if words[:1] in (["--version"], ["--help"]):
        return None
    try:
        while hasattr(command, "commands"):
            if not words:
                return None
            if words[0] not in command.commands:
                return f"no command {words[0]}"
            command, words = command.commands[words[0]], words[1:]
        # --json takes a file or none; the command line itself puts "-" there.
        words = [
            w if w != "--json" or (at + 1 < len(words) and not words[at + 1].startswith("-")) else "--json=-"
            for at, w in enumerate(words)
        ]
        command.make_context(command.name, list(words))  # the parser empties the list it gets
    except typer.Exit:  # --help
        return None
    except UsageError as error:
        return error.format_message()
    return next((f"no key {key}" for key in map(key_of, words) if key and key not in KEYS | SECTIONS), None)


def key_of(word):
    """The key of KEY=VALUE; None for other words."""
    found = re.match(rf"((?:{'|'.join(FIRST)})(?:\.\w+)*)=", word)
    return found[1] if found else None


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("command_line.md")])  # it is generated
def test_commands_that_are_shown_parse(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    wrong = [f"{' '.join(words)}: {why}" for words in commands(text) if (why := problem(words))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_keys_that_are_named_are_in_the_schema(page):
    """In backticks, with or without a value; `log.py` and the like are files."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", (ROOT / page).read_text(encoding="utf-8"))
    named = re.findall(rf"`((?:{'|'.join(FIRST)})\.[a-z_0-9.]+)(?:[=: ][^`]*)?`", text)
    files = re.compile(r"\.(py|yaml|json|jsonl|md|png|npz|npy|tsv|safetensors)$")
    wrong = sorted({key for key in named if key not in KEYS | SECTIONS and not files.search(key)})
    assert not wrong


def test_what_is_wrong_is_seen():
    lines = "X=1 iwm-fast plan a.yaml \\\n  --gpu h200 | tail  # iwm-fast nothing\ntorchrun -m iwm_fast pretrain a"
    shown = f"```sh\n{lines}\n```"
    assert list(commands(shown)) == [["plan", "a.yaml", "--gpu", "h200"], ["pretrain", "a"]]
    assert problem(["plan", "a.yaml", "--gpu", "h200", "train.lr=1"]) is None
    assert problem(["evaluate", "runs/a", "--data", "photos", "--json"]) is None
    assert "train.rate" in problem(["plan", "a.yaml", "train.rate=1"])
    assert "--gpus" in problem(["plan", "a.yaml", "--gpus", "3"])
    assert "nothing" in problem(["bench", "nothing"])
    assert "out" in problem(["pretrain", "a.yaml"])
