"""Put the pictures of `preview` on one sheet with their parameters, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from iwm_fast.file_names import printable

__all__ = ["FILE", "ROWS", "write_contact_sheet"]

FILE = "contact_sheet.png"
ROWS = 32  # about 7,000 pixels, which viewers can open
_SIDE = 192  # pixels of a picture on the sheet
_GAP, _TEXT, _LINE, _FONT = 12, 360, 17, 13
_INK, _SOFT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def write_contact_sheet(out: Path, records: Sequence[Mapping[str, Any]], *, geometric: bool) -> tuple[Path, int]:
    """Write OUT/contact_sheet.png of the pictures in the folder ``out``; (its path, images shown).

    One row per image, or per source if there are several. Columns: the base, the source, its visible patches, the
    target, and the parameters of both. Only the first ROWS rows are shown. records: of params.json. With ``geometric``
    the source has its own crop, which is shown too.
    """
    columns = {"base": "base" if not geometric else "target's crop"}
    columns |= {"source_base": "source's crop"} if geometric else {}
    columns |= {"source": "source", "masked": "masked source", "target": "target"}
    rows = list(_rows(records))[:ROWS]
    font, lines = _font(), [_lines(record, source, k) for _, k, record, source in rows]
    heights = [max(_SIDE, _LINE * len(text)) + _GAP for text in lines]
    width = _GAP + (_SIDE + _GAP) * len(columns) + _TEXT
    sheet = Image.new("RGB", (width, 2 * _LINE + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    titles = [*columns.values(), "source → target"]
    for place, title in enumerate(titles):
        draw.text((_GAP + place * (_SIDE + _GAP), _LINE // 2), title, _INK, font)
    top = 2 * _LINE
    for (number, k, _, _), text, height in zip(rows, lines, heights, strict=True):
        for place, name in enumerate(columns):
            shared = name in ("base", "target") or not k
            with Image.open(out / f"{number:03d}_{name}{'' if shared else f'_{k}'}.png") as picture:
                sheet.paste(_fitted(picture), (_GAP + place * (_SIDE + _GAP), top))
        left = _GAP + len(columns) * (_SIDE + _GAP)
        for line, words in enumerate(text):
            draw.text((left, top + line * _LINE), words, _INK if line else _SOFT, font)
        top += height
    sheet.save(out / FILE)
    return out / FILE, len({number for number, *_ in rows})


def _rows(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield (number of the image, number of its source, the image's record, the source's record)."""
    for number, record in enumerate(records):
        for k, source in enumerate([record, *record.get("more_sources", [])]):
            yield number, k, record, source


def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, which has more letters than Pillow's: arrows, and those of most file names."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), _FONT)


def _fitted(picture: Image.Image) -> Image.Image:
    """Resize a picture to the sheet; small ones show their pixels as squares."""
    how = Image.Resampling.LANCZOS if max(picture.size) > _SIDE else Image.Resampling.NEAREST
    return picture.convert("RGB").resize((_SIDE, _SIDE), how)


def _lines(record: Mapping[str, Any], source: Mapping[str, Any], k: int) -> list[str]:
    """Return one line per parameter: the source's value and the target's."""
    name = printable(str(record["file"]).rsplit("/", 1)[-1])
    lines = [_short(name, 44) + (f", source {k + 1}" if "more_sources" in record else "")]
    theirs, own = record["target"], source["source"]
    lines += [f"{_words(key)}  {own[key]:.2f} → {theirs[key]:.2f}" for key in theirs]
    done = {key: value for key, value in own.items() if key not in theirs}
    if not done.get("blur_sigma", 1):
        done["blur_sigma"] = None
    lines += [f"{_words(key)}  {_value(value)}" for key, value in done.items()]
    if source.get("source_geometry"):
        lines += _geometry(source["source_geometry"], record)
    lines.append(f"seen {len(source['context_patches'])} patches, predicted {len(source['target_patches'])}")
    return lines


def _geometry(own: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    crops = (f"{w}×{h} at {x}, {y}" for x, y, w, h in (own["crop"], target["crop"]))
    yield f"crop  {' → '.join(crops)}"
    yield f"flip  {_value(own['flip'])} → {_value(target['flip'])}"
    yield f"rotation  {90 * own['rotation']}° → {90 * target['rotation']}°"


def _words(key: str) -> str:
    return key.replace("_degrees", ", degrees").replace("_", " ")


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"
