"""The report's page: blocks of data that the templates beside this module lay out, in one self-contained file.

Templates escape all text. Only style, script and charts are marked safe; they are made here.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, ClassVar, Protocol

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from iwm_fast.file_names import valid_unicode

__all__ = [
    "Block",
    "Charts",
    "Fold",
    "Picture",
    "Section",
    "Strips",
    "Table",
    "block_html",
    "document",
    "facts",
    "number",
    "percent",
]

_SMOOTH = 128  # pixels of a side above which an image is smoothed


class Block(Protocol):
    """A part of a section: the data of its template, which refers to it as ``block``."""

    template: ClassVar[str]


@dataclass(frozen=True)
class Table:
    """A heading and rows of texts."""

    template: ClassVar[str] = "table.html"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Charts:
    """Charts of `charts`, each an <svg> element, and a block in the same grid."""

    template: ClassVar[str] = "charts.html"
    charts: Sequence[str]
    beside: Block | None = None


@dataclass(frozen=True)
class Fold:
    """Plain text behind a line that expands it."""

    template: ClassVar[str] = "fold.html"
    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading, verdicts and notes (texts), and its blocks."""

    title: str
    blocks: Sequence[Block]
    notes: Sequence[str] = ()
    verdicts: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A picture with a caption. pixels: shown as squares; asked: it is the correct one."""

    source: str
    caption: str
    pixels: bool
    asked: bool = False

    @classmethod
    def of(cls, image: np.ndarray, caption: str, *, asked: bool = False) -> Picture:
        """Make one from an image (S, S, 3) uint8; small ones show their pixels."""
        return cls(picture_source(image), caption, max(image.shape[:2]) < _SMOOTH, asked)


@dataclass(frozen=True)
class Strips:
    """Rows of pictures, each with a title, under a line of text."""

    template: ClassVar[str] = "strips.html"
    title: str
    rows: Sequence[tuple[str, Sequence[Picture]]]


def number(value: float) -> str:
    """Format a mean reciprocal rank or similar, with three decimals."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    """Format a share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def picture_source(image: np.ndarray) -> str:
    """Return an image (S, S, 3) uint8 as a data URL: lossless if its pixels are shown, else a JPEG."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    form = "png" if max(picture.size) < _SMOOTH else "jpeg"  # a PNG of 160 pixels is five times a JPEG of this quality
    if max(picture.size) > 160:  # twice its displayed size, for high-density screens
        picture.thumbnail((160, 160), Image.Resampling.LANCZOS)
    picture.save(file, format=form, optimize=True, quality=88)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def document(
    title: str, name: str, lead: str, notes: Sequence[str], sections: Sequence[Section], scripts: Sequence[str] = ()
) -> str:
    """Return a self-contained page, whose browser must fetch nothing and run nothing but its own script.

    ``name`` is its heading, with ``lead`` and ``notes`` below. ``scripts``: files beside the templates.
    """
    script = "".join(_file(script) for script in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    text = _templates().get_template("page.html")
    return valid_unicode(
        text.render(
            title=title,
            name=name,
            lead=lead,
            notes=notes,
            sections=sections,
            style=_file("page.css"),
            script=script,
            digest=digest,
        )
    )


def block_html(block: Block) -> str:
    """Render a block."""
    return _templates().get_template(block.template).render(block=block)


@cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("iwm_fast.eval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {}  # keys in their own order
    return found


def _file(name: str) -> str:
    """Return the text of a file beside the templates."""
    return resources.files("iwm_fast.eval.report").joinpath("templates", name).read_text(encoding="utf-8")


def facts(values: Mapping[str, Any]) -> str:
    """Return names and values as lines of text, nested ones indented, for a fold."""
    lines: list[str] = []

    def walk(tree: Mapping[str, Any], indent: str) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                lines.append(f"{indent}{key}:")
                walk(value, indent + "  ")
            else:
                lines.append(f"{indent}{key}: {value}")

    walk(values, "")
    return "\n".join(lines)
