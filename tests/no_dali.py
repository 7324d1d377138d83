"""A Python environment with everything installed except DALI."""

from __future__ import annotations

import sys
import venv
from pathlib import Path

__all__ = ["python_without_dali"]

_ROOT = Path(__file__).resolve().parents[1]


def python_without_dali(folder: Path) -> Path:
    """Make an environment in `folder` of links to this one's packages; return its interpreter.

    `nvidia` is a namespace of several wheels' folders: only DALI's part of it, and its metadata, are missing.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "tree.pth").write_text(f"{_ROOT}\n", encoding="utf-8")
    for place in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for found in place.iterdir():
            if found.name == "nvidia":
                (site / "nvidia").mkdir(exist_ok=True)
                _link(site / "nvidia", [part for part in found.iterdir() if part.name != "dali"])
            elif not found.name.startswith("nvidia_dali") and found.suffix != ".pth":
                _link(site, [found])
    return folder / "bin" / "python"


def _link(folder: Path, targets: list[Path]) -> None:
    for target in targets:
        if not (folder / target.name).exists():
            (folder / target.name).symlink_to(target)
