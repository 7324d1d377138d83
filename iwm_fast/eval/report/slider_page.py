"""The sliders of the report: cards that show the neutral stop without a script, and the script that moves them.

The script reads precomputed results from a block of JSON in each card. The page allows no other script
(`page.document` names its digest), and it fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from iwm_fast.eval.report.page import Picture, picture_source
from iwm_fast.eval.world_model.sliders import Slider, SlidingExample, Stop

__all__ = ["SCRIPT", "SliderCard", "slider_card"]

SCRIPT = "sliders.js"
DISTANCES = {"l2": "all tokens (L2)", "cosine": "mean token (cosine)"}


@dataclass(frozen=True)
class Control:
    """A slider: ``key`` is unique on the page; ``last``: index of its last stop; ``said``: its neutral value."""

    key: str
    name: str
    last: int
    neutral: int
    said: str


@dataclass(frozen=True)
class Nearest:
    """The views nearest to the prediction by one distance, and the rank of the correct one."""

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
    """Return one image's card with its sliders; ``key``, of letters and digits, is unique on the page."""
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
                picture(view, f"{place} · correct" if view == start.view else str(place))
                for place, view in enumerate(start.nearest[distance], start=1)
            ],
        )
        for distance, name in DISTANCES.items()
    ]
    return SliderCard(
        controls=[_control(slider, f"{key}{slider.name}") for slider in example.sliders],
        source=source,
        asked=picture(start.view, _said(first, start)),
        nearest=nearest,
        bank=example.bank,
        data={"pictures": pictures, "sliders": [_stops(slider) for slider in example.sliders]},
    )


def _said(slider: Slider, stop: Stop) -> str:
    """Format a stop's value: a factor, an angle, a strength with its unit."""
    if slider.unit == "degrees":
        return f"{stop.value:+.0f}°".replace("-", "−").replace("+0°", "0°")
    if slider.unit == "factor":
        return f"×{stop.value:.2f}"
    return "none" if stop.value == slider.none else f"{stop.value:.3g} {slider.unit}"


def _control(slider: Slider, key: str) -> Control:
    said = _said(slider, slider.stops[slider.neutral])
    return Control(key, slider.name, len(slider.stops) - 1, slider.neutral, said)


def _stops(slider: Slider) -> dict[str, Any]:
    return {"neutral": slider.neutral, "stops": [_stop(slider, stop) for stop in slider.stops]}


def _stop(slider: Slider, stop: Stop) -> dict[str, Any]:
    said = {
        "said": _said(slider, stop),
        "view": stop.view,
        "nearest": stop.nearest,
        "place": {distance: f"{place:g}" for distance, place in stop.place.items()},
    }
    return said if stop.source is None else said | {"source": stop.source}
