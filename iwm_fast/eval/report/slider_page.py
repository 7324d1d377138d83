"""The sliders of the report: cards that show the neutral stop by themselves, and the script that moves them.

The script reads what was computed beforehand from a block of JSON in each card. It is the only one that the page lets
run (`page.document` names its digest), and it asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from iwm_fast.eval.report.page import Picture, picture_source
from iwm_fast.eval.world_model.sliders import Slider, SlidingExample

__all__ = ["SCRIPT", "SliderCard", "slider_card"]

SCRIPT = "sliders.js"
DISTANCES = {"l2": "all tokens (L2)", "cosine": "mean token (cosine)"}


@dataclass(frozen=True)
class Control:
    """A slider: ``key`` is unique on the page; ``last``: the number of its last stop; ``said``: its neutral value."""

    key: str
    name: str
    last: int
    neutral: int
    said: str


@dataclass(frozen=True)
class Nearest:
    """The views nearest to the answer by one distance, and the place of the one that was asked for."""

    distance: str
    name: str
    place: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class SliderCard:
    """One image with its sliders at their neutral stops; ``data``: of all stops, for the script."""

    template: ClassVar[str] = "sliders.html"
    controls: Sequence[Control]
    source: Picture
    asked: Picture
    nearest: Sequence[Nearest]
    bank: int
    data: Mapping[str, Any]


def slider_card(example: SlidingExample, key: str) -> SliderCard:
    """One image with its sliders; ``key``, of letters and digits, is unique on the page."""
    pictures = [picture_source(image) for image in example.pictures]
    source = Picture.of(example.source, "clean")
    first = example.sliders[0]
    start = first.stops[first.neutral]

    def picture(view: int, caption: str) -> Picture:
        return Picture(pictures[view], caption, source.pixels, asked=view == start.view)

    nearest = [
        Nearest(
            distance,
            name,
            f"{start.place[distance]:g}",
            [
                picture(view, f"{place} · asked" if view == start.view else str(place))
                for place, view in enumerate(start.nearest[distance], start=1)
            ],
        )
        for distance, name in DISTANCES.items()
    ]
    return SliderCard(
        controls=[_control(slider, f"{key}{slider.name}") for slider in example.sliders],
        source=source,
        asked=picture(start.view, _said(first.unit, start.value)),
        nearest=nearest,
        bank=example.bank,
        data={"pictures": pictures, "sliders": [_stops(slider) for slider in example.sliders]},
    )


def _said(unit: str, value: float) -> str:
    """A stop's value in words: a factor or an angle."""
    return f"{value:+.0f}°".replace("-", "−").replace("+0°", "0°") if unit == "degrees" else f"×{value:.2f}"


def _control(slider: Slider, key: str) -> Control:
    said = _said(slider.unit, slider.stops[slider.neutral].value)
    return Control(key, slider.name, len(slider.stops) - 1, slider.neutral, said)


def _stops(slider: Slider) -> dict[str, Any]:
    return {
        "neutral": slider.neutral,
        "stops": [
            {
                "said": _said(slider.unit, stop.value),
                "view": stop.view,
                "nearest": stop.nearest,
                "place": {distance: f"{place:g}" for distance, place in stop.place.items()},
            }
            for stop in slider.stops
        ],
    }
