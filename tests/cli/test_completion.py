"""What Tab offers, and that asking for it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from iwm_fast.cli.completion import config_files, config_or_overrides, overrides
from iwm_fast.config.load import packaged_names


def at(monkeypatch, line, place):
    """As bash asks: it takes = for a word of its own."""
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(place))


def test_packaged_configurations_and_own_files_are_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("vit_mine.yaml", "vit_notes.txt", ".vit_hidden.yaml"):
        Path(name).touch()
    Path("vit_more").mkdir()
    Path("vit_more/big.yml").touch()
    packaged = [name for name in packaged_names() if name.startswith("vit_")]
    assert config_files("vit_") == sorted([*packaged, "vit_mine.yaml", "vit_more/"])
    assert config_files("vit_more/") == ["vit_more/big.yml"]
    assert config_files(f"{tmp_path}/vit_m") == [f"{tmp_path}/vit_mine.yaml", f"{tmp_path}/vit_more/"]
    assert config_files("nothing/here") == []


@pytest.mark.parametrize(
    ("incomplete", "offered"),
    [
        ("train.warm", ["train.warmup=", "train.warmup_epochs=", "train.warmup_ratio="]),
        ("train.prec", ["train.precision=", "train.precision=fp32", "train.precision=bf16"]),
        ("train.precision=b", ["train.precision=bf16"]),
        ("train.compile=", ["train.compile=true", "train.compile=false"]),
        ("train.ema=", ["train.ema=[0.996,1.0]"]),
        ("train.nothing", []),
        ("train.nothing=", []),
    ],
)
def test_keys_and_their_values_are_offered(incomplete, offered):
    assert overrides(incomplete) == offered


@pytest.mark.parametrize(
    ("line", "place", "offered"),
    [
        ("iwm-fast plan demo train.precision =", 4, ["fp32", "bf16"]),
        ("iwm-fast plan demo train.precision = ", 5, ["fp32", "bf16"]),
        ("iwm-fast plan demo train.precision = b", 5, ["bf16"]),
        ("iwm-fast pretrain =", 2, []),
    ],
)
def test_bash_s_words_behind_the_sign_are_values(line, place, offered, monkeypatch):
    at(monkeypatch, line, place)
    assert config_or_overrides("" if line.endswith(" ") else line.split()[-1]) == offered


@pytest.mark.parametrize(
    ("words", "place", "offered"),
    [("iwm-fast comp", 1, ["compare"]), ("iwm-fast pretrain train.warmup_r", 2, ["train.warmup_ratio="])],
)
def test_completion_answers_and_loads_nothing_heavy(words, place, offered, tmp_path):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'deepspeed', 'nvidia', 'xformers', 'numpy', 'matplotlib'}\n"
        "atexit.register(lambda: print('loaded:', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from iwm_fast.cli.main import main\n"
        "sys.exit(main())"
    )
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(place), "_IWM_FAST_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"HOME": str(tmp_path), **asked}
    )
    assert done.stdout.split()[: len(offered)] == offered
    assert done.stderr == "loaded: []\n"
