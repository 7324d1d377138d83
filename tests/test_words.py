"""The words that users read are the field's own.

The test reads the help of every command and option, the configuration's descriptions, every string, docstring and
comment of the code (errors, notices, tables, footnotes of the report page), the page's templates, README, CONTRIBUTING
and docs/. It skips code in prose: inline code and blocks of shell, Python, YAML and JSON.

A phrase stands in the table where a pattern tells its private sense from the usual one. No pattern does so for "keeps"
outside of "keeps … for the backward pass", "average" for the EMA, "start" for a launch outside of "this start" and its
like, "costs" and "takes" for time and memory, "side" for a baseline, "join" for concatenate: those are left to readers.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.main import get_command

from iwm_fast.cli.main import app
from iwm_fast.config.schema_table import rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "iwm_fast/eval/report/templates/*")
CODE = ("iwm_fast", "kernels", "benchmarks", "examples")

# "3 images a step", "GB/s a GPU", "a folder a class"; not "images a rank computes"
_COUNTED = (
    r"(\d[*_)`%]*|\b(ms|s|µs|[kKMG]i?B|GFLOPs?|FLOPs|bytes|images|samples|tokens|numbers?|memory|seconds|launches|"
    r"operations|blocks|one|folder|object|class|values?))"
)
_PER = "step|image|rank|token|second|sample|batch|GPU|device|host|line|class|pixel|shard|node|core|component"
_VERBS = "is|has|alone|computes|reads|sees|holds|needs|takes"


class Phrase(NamedTuple):
    """A pattern, what to write instead, and a sentence in which it must be found."""

    pattern: str
    instead: str
    example: str


PHRASES = [
    Phrase(
        r"\b(is|are|was|were) told\b(?! (by|apart|from))", "is conditioned on, is given", "it is told what was done"
    ),
    Phrase(
        r"\btold (an?|the|no|another view's) action", "conditioned on, given", "Shuffled: told another view's action."
    ),
    Phrase(r"\btold (of|as|nothing|one of)\b", "conditioned on, given; encoded as", "Neutral: told of no change."),
    Phrase(r"\b(answers?|answered|answering) for\b(?! `)", "predicts", "the predictor answers for all patches"),
    Phrase(
        r"\basked (for|of)\b|\b[Tt]raining asks for\b", "queried, to predict; requested", "the view that was asked for"
    ),
    Phrase(rf"{_COUNTED} an? ({_PER})\b(?! ({_VERBS})\b)", "per step, per image, per rank", "3 ms a step"),
    Phrase(r"\b(matrix|two|three|its|the|of) products?\b(?! of)", "matmul, matrix multiplication", "two products each"),
    Phrase(r"\b(standard )?deviations?\b", "std", "the mean and deviation of a row"),
    Phrase(
        r"\b(made|computed?|computes|makes (it|them)) again\b", "recomputed; repeated", "activations are made again"
    ),
    Phrase(
        r"\bgo(es|ing)? on from\b|\b(it|run|job|training) goes on\b(?! the)|\bto go on\b(?! reading)",
        "resumes",
        "it goes on",
    ),
    Phrase(r"\bdestroyed\b", "corrupted", "the source is destroyed"),
    Phrase(r"\bwhat it (takes|costs)\b|\bit is worth\b", "time, memory, FLOPs; accuracy gained", "what it costs"),
    Phrase(r"\b[Pp]lain training\b", "a reference implementation in plain PyTorch", "beside the plain training"),
    Phrase(r"(?<!part )(?<![-.])\bpeers?\b(?!:)", "baseline; rank", "1.6 times as fast as the peer"),
    Phrase(r"(?<!-)\barms?\b", "variant; sweep", "every arm of the study"),
    Phrase(
        r"\bever other lengths\b|\bof one length\b",
        "variable-length; bucketed by length",
        "images of one length at a time",
    ),
    Phrase(r"\bbr(ing|ings|ought|inging) together\b", "concatenate; all-gather", "the rows are brought together"),
    Phrase(
        r"\b(this|an earlier|every|each|the next) start\b(?! of)", "launch, run", "rows of an earlier start were kept"
    ),
    Phrase(
        r"\bke(eps?|pt|eping)\b[^.;:]{0,40}\bfor (the|its) backward\b",
        "saves, saved activations",
        "kept for the backward pass",
    ),
    Phrase(
        r"\b(draws?|drawn|drawing)( its own| a set of| the)? (images|masks?|parameters)\b",
        "generates; samples",
        "draws its own images",
    ),
    Phrase(
        r"\bdrawn( log-)? ?(uniformly|again)\b|\b(images|masks|parameters) are drawn\b",
        "sampled; generated",
        "pixels, drawn uniformly",
    ),
    Phrase(r"\b(from|to|in|of|on) (a|the) store\b", "object store", "16 from a store"),
]


def _strings(tree: ast.Module) -> Iterator[str]:
    """Every string; a formatted value counts as the digit 0."""
    parts = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(p.value if isinstance(p, ast.Constant) else "0" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def _comments(text: str) -> Iterator[str]:
    """Every comment; those on neighbouring lines are one."""
    found: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, words = token.start[0], token.string.lstrip("# ")
            if found and found[-1][0] == line - 1:
                words = f"{found.pop()[1]} {words}"
            found.append((line, words))
    yield from (words for _, words in found)


def _prose(text: str) -> str:
    """A text without its code."""
    text = re.sub(r"^ *```(sh|python|yaml|json)\n.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`+[^`\n]+`+", "`code`", text)


def _paths() -> list[Path]:
    code = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    return sorted({*code, *(path for pattern in PAGES for path in ROOT.glob(pattern))})


def _texts(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from map(_prose, (*_strings(ast.parse(text)), *_comments(text)))
    elif path.suffix == ".md":
        yield from _prose(text).split("\n\n")
    else:
        yield text


def _found(texts: Iterator[str]) -> list[str]:
    """The phrases in texts, each with the words around it and what to write instead."""
    found = []
    for text in texts:
        line = " ".join(text.split())
        for phrase in PHRASES if " " in line else ():
            for match in re.finditer(phrase.pattern, line):
                around = line[max(0, match.start() - 50) : match.end() + 30]
                found.append(f"…{around}…: {match[0]!r}; write {phrase.instead}")
    return found


def _help(command) -> Iterator[str]:
    yield from filter(None, (command.help, command.epilog, command.short_help))
    yield from (parameter.help for parameter in command.params if getattr(parameter, "help", None))
    for inside in getattr(command, "commands", {}).values():
        yield from _help(inside)


@functools.cache
def _by_file() -> dict[str, list[str]]:
    files = {path.relative_to(ROOT).as_posix(): _found(_texts(path)) for path in _paths()}
    return files | {
        "help of the command line": _found(_help(get_command(app))),
        "descriptions of the configuration": _found(row.description for row in rows()),
    }


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.instead)
def test_each_pattern_finds_its_own_example(phrase):
    assert re.search(phrase.pattern, phrase.example)


@pytest.mark.parametrize(
    "text",
    [
        "Draw a picture of the parts of the step.",
        "Features are kept in RUN/cache.",
        "the two kinds can be told apart",
        "average pooling over all tokens",
        "the images a rank computes at once",
        "Start the ranks with torchrun.",
        "stopped as asked at a step",
    ],
)
def test_the_usual_senses_of_the_words_pass(text):
    assert _found(iter([text])) == []


def test_every_text_uses_the_words_of_the_field():
    found = {name: phrases for name, phrases in _by_file().items() if phrases}
    assert found == {}
