"""The package: its required versions, and that the wheel holds every file of the tree exactly once."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
# Versions that ran together (the CPU column is what CI installs), and the next release of each, untested.
BOUNDS = {
    "torch": (">=2.11,<2.14", ["2.11.0", "2.12.0", "2.13.0"], ["2.10.0", "2.14.0"]),
    "triton": (">=3.6,<3.8", ["3.6.0", "3.7.0", "3.7.1"], ["3.5.1", "3.8.0", "3.9.0"]),
    "xformers": (">=0.0.35,<0.0.36", ["0.0.35"], ["0.0.34", "0.0.36"]),
    "deepspeed": (">=0.19.8,<0.20", ["0.19.8"], ["0.19.7", "0.20.0"]),
    "nvidia-dali-cuda130": (">=2.4,<2.5", ["2.4.0"], ["2.3.0", "2.5.0"]),
}
# Files of the report's page, beside its code.
TEMPLATES = {
    f"iwm_fast/eval/report/templates/{path.name}"
    for path in (ROOT / "iwm_fast" / "eval" / "report" / "templates").iterdir()
}
CARD = {"iwm_fast/export/templates/README.md"}


def keyword(name: str) -> object:
    """Return a literal argument of setup() in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"]
    return next(ast.literal_eval(k.value) for k in calls[0].keywords if k.arg == name)


@pytest.mark.parametrize("package", BOUNDS)
def test_required_versions_are_those_that_ran_together(package):
    specifier, inside, outside = BOUNDS[package]
    required = {(r := Requirement(text)).name: r.specifier for text in keyword("install_requires")}
    assert required[package] == SpecifierSet(specifier)
    assert all(version in required[package] for version in inside)
    assert not any(version in required[package] for version in outside)


def test_python_3_11_and_later():
    assert SpecifierSet(keyword("python_requires")) == SpecifierSet(">=3.11")


def test_extras():
    names = ["bench", "docs", "games", "hf", "onnx", "parquet", "prometheus", "s3", "test", "wandb"]
    assert sorted(keyword("extras_require")) == names


@pytest.mark.parametrize("name", ["kernels", "configs", "benchmarks"])
def test_the_links_of_the_checkout_are_relative(name):
    link = ROOT / "iwm_fast" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


def test_benchmarks_have_one_name():
    """Imported as `benchmarks` too, a module would exist twice, and one's classes would not be the other's."""
    other = re.compile(r"^\s*(from|import) benchmarks\b", re.MULTILINE)
    assert [path.name for path in _sources(ROOT / "benchmarks") if other.search(path.read_text(encoding="utf-8"))] == []


def test_readme_begins_with_two_commands_of_one_line():
    """The first sets up and runs the demonstration, the second sets up and runs the tests."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    begin = "python3 -m venv .venv && .venv/bin/pip install "
    assert blocks[0] == f"{begin}. && .venv/bin/iwm-fast demo --out runs/demo\n"
    assert blocks[1] == f"{begin}'.[test]' && .venv/bin/python -m pytest -q -n auto\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Return a copy of what packages are built from, so that the checkout stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("iwm_fast", "kernels", "configs", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """Build the wheel without the network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("iwm_fast-*.whl"))


def test_wheel_holds_every_module_and_configuration_once(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = Counter(archive.namelist())
    engine = {f"iwm_fast/{p.relative_to(ROOT / 'iwm_fast')}" for p in _sources(ROOT / "iwm_fast")}
    mapped = {f"iwm_fast/{p.relative_to(ROOT)}" for name in ("kernels", "benchmarks") for p in _sources(ROOT / name)}
    configs = {
        f"iwm_fast/configs/{p.relative_to(ROOT / 'configs')}"
        for pattern in ("*.yaml", "ablations/*.yaml", "deepspeed/*.json", "slurm/*.sbatch")
        for p in (ROOT / "configs").glob(pattern)
    }
    expected = engine | mapped | configs | TEMPLATES | CARD | {"iwm_fast/py.typed", "iwm_fast/kernels/tuned.json"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert set(names.values()) == {1}


def test_sdist_holds_what_the_report_is_made_of(tree, tmp_path):
    assert {path.rpartition(".")[2] for path in TEMPLATES} == {"html", "css", "js"}
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("iwm_fast-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= TEMPLATES | CARD


def _sources(folder: Path) -> list[Path]:
    """Return Python files below a folder, links not followed."""
    return [p for p in folder.rglob("*.py") if not any(parent.is_symlink() for parent in p.parents)]


def test_what_the_wheel_holds_runs_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import importlib.resources, iwm_fast.kernels\n"
        "from iwm_fast.config import load_config, packaged_config\n"
        "print(load_config(packaged_config('demo')).model.encoder)\n"
        "print(importlib.resources.files('iwm_fast.configs').joinpath('deepspeed/zero3.json').is_file())\n"
        "from iwm_fast.eval.report.page import document\n"
        "print('</html>' in document('a', 'a', '', [], [], ['sliders.js']))\n"
        "print(iwm_fast.__file__)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "vit_micro",
        "True",
        "True",
        str(tmp_path / "site" / "iwm_fast" / "__init__.py"),
    ]
