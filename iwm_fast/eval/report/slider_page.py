"""The sliders of the report: HTML that shows the neutral stop by itself, and the script that moves it.

The script reads what was computed beforehand from a block of JSON in each card. It is the only one that the page lets
run (`page.document` names its digest), and it asks for nothing.
"""

from __future__ import annotations

import html
import json

from iwm_fast.eval.report.page import picture_source, pixel_class
from iwm_fast.eval.world_model.sliders import Slider, SlidingExample

__all__ = ["SCRIPT", "slider_card"]

SCRIPT = """
"use strict";
for (const card of document.querySelectorAll(".sliders")) {
  const data = JSON.parse(card.querySelector("script").textContent);
  const inputs = [...card.querySelectorAll("input")];
  const show = (slider, at) => {
    const stop = slider.stops[at];
    const put = (figure, picture, caption, asked) => {
      const image = figure.querySelector("img");
      image.src = data.pictures[picture];
      image.alt = caption;
      figure.querySelector("figcaption").textContent = caption;
      figure.classList.toggle("true", asked);
    };
    put(card.querySelector(".asked figure"), stop.view, stop.said, true);
    for (const row of card.querySelectorAll("[data-distance]")) {
      const nearest = stop.nearest[row.dataset.distance];
      row.querySelectorAll("figure").forEach((figure, i) => {
        const asked = nearest[i] === stop.view;
        put(figure, nearest[i], asked ? (i + 1) + " · asked" : String(i + 1), asked);
      });
      row.querySelector(".place").textContent = stop.place[row.dataset.distance];
    }
  };
  inputs.forEach((input, i) => {
    const slider = data.sliders[i];
    const say = (other, at) => {
      const words = data.sliders[other].stops[at].said;
      inputs[other].setAttribute("aria-valuetext", words);
      inputs[other].parentElement.querySelector("output").textContent = words;
    };
    input.disabled = false;
    input.addEventListener("input", () => {
      inputs.forEach((other, j) => {
        if (j !== i) {
          other.value = data.sliders[j].neutral;
          say(j, data.sliders[j].neutral);
        }
      });
      const at = Number(input.value);
      say(i, at);
      show(slider, at);
    });
  });
}
"""

DISTANCES = {"l2": "all tokens (L2)", "cosine": "mean token (cosine)"}


def _said(unit: str, value: float) -> str:
    """A stop's value in words: a factor or an angle."""
    return f"{value:+.0f}°".replace("-", "−").replace("+0°", "0°") if unit == "degrees" else f"×{value:.2f}"


def _figure(source: str, caption: str, pixels: str, *, true: bool = False) -> str:
    outer = ' class="true"' if true else ""
    return f'<figure{outer}><img{pixels} alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _control(slider: Slider, key: str) -> str:
    said = _said(slider.unit, slider.stops[slider.neutral].value)
    return (
        f'<p class="control"><label for="{key}">{slider.name}</label>'
        f'<input id="{key}" type="range" min="0" max="{len(slider.stops) - 1}" step="1" value="{slider.neutral}" '
        f'aria-valuetext="{said}" autocomplete="off" disabled><output for="{key}">{said}</output></p>'
    )


def slider_card(example: SlidingExample, key: str) -> str:
    """One image with its sliders; ``key``, of letters and digits, is unique on the page."""
    pictures = [picture_source(image) for image in example.pictures]
    pixels = pixel_class(example.source)
    first = example.sliders[0]
    start = first.stops[first.neutral]
    said = _said(first.unit, start.value)
    rows = (
        f'<div class="row"><span>Source</span><div class="strip">'
        f"{_figure(picture_source(example.source), 'clean', pixels)}</div></div>"
        f'<div class="row"><span>View asked for</span><div class="strip asked">'
        f"{_figure(pictures[start.view], said, pixels, true=True)}</div></div>"
    )
    for distance, name in DISTANCES.items():
        nearest = "".join(
            _figure(pictures[view], f"{i} · asked" if view == start.view else str(i), pixels, true=view == start.view)
            for i, view in enumerate(start.nearest[distance], start=1)
        )
        rows += (
            f'<div class="row" data-distance="{distance}" aria-live="polite"><span>Nearest by {name}; asked for is '
            f'<strong class="place">{start.place[distance]:g}</strong> of {example.bank}</span>'
            f'<div class="strip">{nearest}</div></div>'
        )
    controls = "".join(_control(slider, f"{key}{slider.name}") for slider in example.sliders)
    return (
        f'<div class="example sliders">{controls}<div class="rows">{rows}</div>'
        f'<script type="application/json">{_data(example, pictures)}</script></div>'
    )


def _data(example: SlidingExample, pictures: list[str]) -> str:
    sliders = [
        {
            "neutral": slider.neutral,
            "stops": [
                {
                    "said": html.escape(_said(slider.unit, stop.value)),
                    "view": stop.view,
                    "nearest": stop.nearest,
                    "place": {distance: f"{place:g}" for distance, place in stop.place.items()},
                }
                for stop in slider.stops
            ],
        }
        for slider in example.sliders
    ]
    # Nothing in a block of a page may look like its end, whatever a name holds.
    return json.dumps({"pictures": pictures, "sliders": sliders}).replace("<", "\\u003c")
