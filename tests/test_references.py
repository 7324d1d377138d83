"""Files, modules, names, tests, links and headings that prose refers to exist.

Prose is Markdown, and in code the docstrings and comments. CHANGELOG.md is about the past and is left out.
"""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from iwm_fast.config.schema_table import rows, section_keys
from tools.documentation.hooks import github_anchor

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("kernels", "configs", "benchmarks")
ENDINGS = "py|md|yaml|json|toml|png|svg|sbatch|cpp"

PLACEHOLDERS = ("FILE", "NAME", "NEW", "PICTURE")
# Endings of files in runs, data and exports; then the packages' names up to 0.1.0.
DATA = "jpg json jsonl md npy onnx parquet pickle png pt py safetensors toml txt yaml yml"
# Names in libraries, their documentation and machine code, and a variable of the documentation's examples.
ELSEWHERE = ("cvt", "decoders", "tf", "world")
OF_DATA = "images masks photos test train val"
RETIRED = ("arms", "commands", "planning", "profiling", "savings", "settings")


def tracked():
    """Return the checkout's files, untracked ones included, without the links in iwm_fast/."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if not (ROOT / name).is_symlink() and (ROOT / name).is_file()]


pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
FILES = frozenset(tracked()) if (ROOT / ".git").exists() else frozenset()
FOLDERS = frozenset(str(parent) for name in FILES for parent in Path(name).parents)
TOP = sorted({name.split("/")[0] for name in FILES if "/" in name})
PAGES = sorted(name for name in FILES if name.endswith(".md") and not name.startswith("CHANGELOG"))
CODE = sorted(name for name in FILES if name.endswith(".py"))
OTHERS = sorted(name for name in FILES if name.endswith((".yaml", ".toml", ".sbatch", ".cpp")) or name == "Makefile")
PROSE = PAGES + CODE + OTHERS


@cache
def tree(name):
    """Return the syntax tree of a file."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


@cache
def prose(name):
    """Return the lines of prose of a file, as (line number, text)."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name in PAGES:
        return list(enumerate(text.splitlines(), 1))
    if name in OTHERS:
        lines = enumerate(text.splitlines(), 1)
        return [(number, line.partition("#")[2] if "#" in line else "") for number, line in lines]
    # " # " in a string is prose as well.
    comments = (re.match(r"(?:|.*\s)#:? (.*)", line) for line in text.splitlines())
    found = [(number, comment[1]) for number, comment in enumerate(comments, 1) if comment]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found += enumerate(first.value.value.splitlines(), first.lineno)
    return found


def matches(pattern, names):
    """Yield (place, match) of a pattern in the prose of files."""
    for name in names:
        for number, line in prose(name):
            for match in re.finditer(pattern, line):
                yield f"{name}:{number}", match


def linked(path):
    """Resolve a path through one of the links in iwm_fast/."""
    return re.sub(rf"^iwm_fast/(?=(?:{'|'.join(MAPPED)})/)", "", path)


def file_of_module(dotted):
    """Return the file of a module or package by its dotted name, or None. Mapped folders have two names."""
    parts = dotted.split(".")
    if parts[0] == "iwm_fast" and parts[1:2] and parts[1] in MAPPED:
        parts = parts[1:]
    path = "/".join(parts)
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in FILES), None)


@cache
def names_in(file):
    """Return what a module's top level and its classes define, "Class.attribute" for these."""

    def defined(body):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        yield target.id, None
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    yield alias.asname or alias.name, None
            elif isinstance(node, ast.If):
                yield from defined(node.body)

    found = set()
    for name, node in defined(tree(file).body):
        found.add(name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{name}.{below}" for below, _ in defined(node.body)}
    return found


def names_something(dotted):
    """Return whether a dotted name is a module, or a module and what is defined there."""
    parts = dotted.split(".")
    if linked("/".join(parts) + "/").rstrip("/") in FOLDERS:
        return True
    for count in range(len(parts), 0, -1):
        file = file_of_module(".".join(parts[:count]))
        if file is not None:
            return count == len(parts) or ".".join(parts[count:]) in names_in(file)
    return False


def is_key(dotted):
    """Return whether it is a key of the configuration, or a section."""
    return dotted in section_keys() or any(row.key == dotted for row in rows())


@cache
def identifiers(file):
    """Return names in the code of a file: variables, arguments, keywords, imports."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
    return found


def is_known(dotted, file):
    """Return whether a dotted name in backticks is ours, a key, a file's, a library's, or one of the file's code."""
    head, _, rest = dotted.partition(".")
    if dotted.rpartition(".")[2] in DATA.split() or head in ELSEWHERE or is_key(dotted) or "NAME" in rest:
        return True
    if names_something(dotted) or names_something(f"iwm_fast.{dotted}"):
        return True
    path = dotted.replace(".", "/")
    if any(name.endswith((f"/{path}.py", f"/{path}/__init__.py")) for name in CODE):
        return True
    modules = [name for name in CODE if Path(name).stem == head or name.endswith(f"/{head}/__init__.py")]
    if any(rest in names_in(name) for name in modules):
        return True
    if not modules and head not in RETIRED and find_spec(head) is not None:
        return True
    return file in CODE and head in identifiers(file) and f"iwm_fast/{head}" not in FOLDERS


def test_files_that_are_named_exist():
    """By path from the root, or in backticks by its end: `engine/step.py`. FILE stands for any."""
    tops = "|".join(map(re.escape, TOP))
    missing = [
        f"{place}: {found[1]}"
        for place, found in matches(rf"(?<![\w/.*$}}<~-])((?:{tops})/[\w./-]+\.(?:{ENDINGS}))\b", PROSE)
        if found[1] not in FILES and linked(found[1]) not in FILES and Path(found[1]).stem not in PLACEHOLDERS
    ]
    missing += [
        f"{place}: {found[1]}"
        for place, found in matches(r"`([\w./-]+\.py)`", PROSE)
        if not any(f"/{name}".endswith(f"/{found[1]}") for name in FILES)
    ]
    assert not missing, "\n".join(missing)


def test_folders_that_are_named_exist():
    missing = [
        f"{place}: {found[1]}"
        for place, found in matches(r"`([a-z_][\w/]*)/`", PROSE)
        if found[1] not in OF_DATA.split()
        and linked(f"{found[1]}/")[:-1] not in FOLDERS
        and not any(name.endswith(f"/{found[1]}") for name in FOLDERS)
    ]
    assert not missing, "\n".join(missing)


def test_modules_that_are_named_exist_and_define_what_is_named():
    """A dotted name from a package on, anywhere; in backticks also from any folder or module on: `step.Trainer`."""
    missing = [
        f"{place}: {found[1]}"
        for place, found in matches(
            r"(?<![\w./\[-])((?:iwm_fast|benchmarks|tools)(?:\.[A-Za-z_]\w*)+)(?![\w/]|\.\w)", PROSE
        )
        if not names_something(found[1]) and found[1].rpartition(".")[2] not in PLACEHOLDERS
    ]
    missing += [
        f"{place}: {found[1]}"
        for place, found in matches(r"`([a-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?`", PROSE)
        if not is_known(found[1], place.partition(":")[0])
    ]
    assert not missing, "\n".join(missing)


def test_tests_that_are_named_exist():
    tests = {name for file in CODE if file.startswith("tests/") for name in names_in(file)}
    tests |= {Path(file).stem for file in CODE if file.startswith("tests/")}
    missing = [
        f"{place}: {found[1]}"
        for place, found in matches(r"(?<![\w-])(test_\w+)(?!\w|\()", PROSE)
        if found[1] not in tests
    ]
    assert not missing, "\n".join(missing)


def anchors(page):
    """Return the anchors that GitHub gives a page's headings."""
    found, fenced = set(), False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"#+ (.*)", line)
        if heading:
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            found.add(github_anchor(words))
    return found


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = re.sub(r"(?ms)^```.*?^```|^    .*?$|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"""\]\(([^)\s]+)\)|(?:src|href)="([^"]+)""", text):
        path, _, anchor = "".join(target).partition("#")
        if re.match(r"[a-z]+:", path):  # of another site
            continue
        file = str(((ROOT / page).parent / path).resolve().relative_to(ROOT)) if path else page
        if file not in FILES | FOLDERS or (anchor and anchor not in anchors(file)):
            broken.append("".join(target))
    assert not broken


def pages_of(navigation):
    """Return the pages of the site's navigation, in order."""
    for entry in navigation:
        below = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from pages_of(below) if isinstance(below, list) else [below]


def test_every_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = yaml.safe_load(text[text.index("\nnav:") :])["nav"]
    listed = [f"docs/{page}" for page in pages_of(navigation)]
    assert sorted(listed) == [page for page in PAGES if page.startswith("docs/")], (
        "give each page its place in mkdocs.yml"
    )


def test_headings_that_code_names_exist():
    places = list(matches(r"(?<![\w/])((?:docs/[\w/]+|README|CONTRIBUTING)\.md)#([\w-]+)", CODE + OTHERS))
    missing = [f"{place}: {found[0]}" for place, found in places if found[2] not in anchors(found[1])]
    assert not missing, "\n".join(missing)


def test_what_does_not_exist_is_seen():
    """The checks above would pass if they found nothing."""
    assert names_something("iwm_fast.engine.step.Trainer")
    assert not names_something("iwm_fast.planning.plan")
    assert not names_something("iwm_fast.engine.step.Nobody")
    assert is_known("tuner.Tuner", "README.md")
    assert not is_known("engine.upkeep.Upkeep", "benchmarks/step.py")
    assert not is_known("planning.counting", "benchmarks/step.py")
    assert is_key("data.root")
    assert not is_key("data.pairs")
    assert len(list(matches(r"`[\w/]+\.py`", PAGES))) > 10
