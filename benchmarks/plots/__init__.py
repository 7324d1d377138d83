"""Plots of benchmark results, and the parts that the programs share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwm_fast.outputs import require_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["result_and_picture", "save"]


def result_and_picture(about: str | None) -> tuple[dict[str, Any], Path]:
    """Parse the command line; return the result that it names, and the picture's path, checked to be writable.

    ``about``: the program's help.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    require_file(args.picture, "picture")
    return json.loads(args.results.read_text(encoding="utf-8")), args.picture


def save(figure: Figure, picture: Path) -> None:
    """Write a picture, and create its folder."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
