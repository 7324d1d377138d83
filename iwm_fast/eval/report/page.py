"""The report's HTML in pieces: style, tables and pictures. All text is escaped here."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from iwm_fast.eval.world_model.examples import RankedExample, RankedView
from iwm_fast.file_names import valid_unicode

__all__ = [
    "document",
    "example_block",
    "facts",
    "fold",
    "number",
    "percent",
    "picture_source",
    "pixel_class",
    "section",
    "table",
]

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #5b6470; --page: #ffffff; --card: #f5f6f8; --line: #d9dde3; --good: #2e8b57; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --soft: #9aa5b1; --page: #14171b; --card: #1d2127; --line: #343b44; --good: #4fc586; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.2rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
td:nth-child(2) { font-weight: 700; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
  align-items: start; margin-top: 1rem; }
.charts > div, .example, pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .7rem; }
.charts svg { display: block; width: 100%; height: auto; }
.example { margin: .8rem 0; } .example > p { margin: 0 0 .5rem; max-width: none; }
.rows { display: flex; flex-wrap: wrap; gap: .7rem 1.6rem; }
.row > span { display: block; color: var(--soft); font-size: .85rem; margin-bottom: .25rem; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; }
figure { margin: 0; } figcaption { font-size: .75rem; text-align: center; color: var(--soft); }
img { display: block; width: 4.2rem; height: 4.2rem; border-radius: .3rem; border: 2px solid transparent; }
img.pixels { image-rendering: pixelated; }
.true img { border-color: var(--good); } .true figcaption { color: var(--good); font-weight: 700; }
.control { display: grid; grid-template-columns: 6rem 1fr 3.4rem; gap: .7rem; align-items: center; }
.control input { width: 100%; min-height: 2.2rem; margin: 0; accent-color: var(--good); }
.control output { text-align: right; font-variant-numeric: tabular-nums; }
.sliders .rows { margin: .7rem 0; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .8rem; }
"""

_SMOOTH = 128  # pixels of a side from which on an image is shown smoothed


def number(value: float) -> str:
    """A mean reciprocal rank or its like, three digits after the point."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * value:.1f} %"


def document(title: str, body: str, script: str = "") -> str:
    """A page that needs nothing from elsewhere, and whose browser is told to fetch nothing and to run ``script`` alone.

    ``body`` is HTML.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    allowed = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return valid_unicode(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def section(title: str, body: str, *notes: str) -> str:
    """A heading, its notes (text) and its body (HTML)."""
    words = "".join(f'<p class="soft">{html.escape(note)}</p>' for note in notes)
    return f"<section><h2>{html.escape(title)}</h2>{words}{body}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts that scrolls by itself on a narrow screen."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def fold(title: str, text: str) -> str:
    """Plain text behind a line that opens it."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def picture_source(image: np.ndarray) -> str:
    """The address of an image (S, S, 3) uint8 that holds it: exact where its pixels are shown, else a JPEG."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    form = "png" if max(picture.size) < _SMOOTH else "jpeg"  # a PNG of 160 pixels is five times a JPEG of this quality
    if max(picture.size) > 160:  # twice the size at which it is shown, for dense screens
        picture.thumbnail((160, 160), Image.Resampling.LANCZOS)
    picture.save(file, format=form, optimize=True, quality=88)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def pixel_class(image: np.ndarray) -> str:
    """The attribute of an <img> that shows the pixels of an image (S, S, 3) as squares, or nothing for a large one."""
    return ' class="pixels"' if max(image.shape[:2]) < _SMOOTH else ""


def _picture(image: np.ndarray, caption: str, *, true: bool = False) -> str:
    """An image (S, S, 3) uint8 within the page; small ones show their pixels."""
    words = html.escape(caption)
    pixels = pixel_class(image)
    outer = ' class="true"' if true else ""
    return (
        f'<figure{outer}><img{pixels} alt="{words}" src="{picture_source(image)}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _views(title: str, views: Sequence[RankedView]) -> str:
    pictures = "".join(
        _picture(view.image, f"{view.place} · asked" if view.true else str(view.place), true=view.true)
        for view in views
    )
    return f'<div class="row"><span>{html.escape(title)}</span><div class="strip">{pictures}</div></div>'


def _place(rank: float) -> str:
    return f"{rank:g}"


def _told(action: Mapping[str, float]) -> str:
    """An action in words: jitter with its units, a choice by its name, other components with their values."""
    if "brightness" in action:
        words = (
            f"brightness ×{action['brightness']:.2f}, contrast ×{action['contrast']:.2f}, "
            f"saturation ×{action['saturation']:.2f}, hue {action['hue']:+.0f}°"
        )
    elif list(action.values()) == [1.0]:
        words = f"action {next(iter(action))}"
    else:
        words = ", ".join(f"{name} {value:+.2f}" for name, value in action.items())
    return words.replace("-", "−")


def example_block(example: RankedExample) -> str:
    """One image: what was asked for, what the model ranks first, what the controls rank first."""
    asked = _picture(example.source, "source") + _picture(example.target, "asked for", true=True)
    rows = (
        f'<div class="row"><span>Source and the view asked for</span><div class="strip">{asked}</div></div>'
        + _views("Ranked by the world model", example.ranked)
        + _views(f"Told another action: ranked {_place(example.rank_shuffled)}", example.shuffled)
        + _views(f"Told no action: ranked {_place(example.rank_neutral)}", example.neutral)
    )
    return (
        f'<div class="example"><p>{html.escape(_told(example.action))}: the view asked for is ranked '
        f"<strong>{_place(example.rank)} of {example.bank}</strong></p>"
        f'<div class="rows">{rows}</div></div>'
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and values as lines of text, nested ones indented, for a fold."""
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
