"""The sliders of the report: each stop shows the model's prediction, and a browser displays it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import reference_views
import torch
from browser import Page, find_chromium
from PIL import Image
from worlds import RAW, Deaf, Oracle, pictures, tiny_config, tiny_model

from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import Jitter
from iwm_fast.config import ActionsConfig, Config
from iwm_fast.eval.report.page import block_html
from iwm_fast.eval.report.report import write_report
from iwm_fast.eval.report.slider_page import slider_card
from iwm_fast.eval.world_model.bank import jittered_views
from iwm_fast.eval.world_model.sliders import sliding_examples

SPACE = ActionSpace()
NAMES = ("brightness", "contrast", "saturation", "hue")


def view(image, name, value):
    jitter = Jitter.neutral(1)
    values = {n: getattr(jitter, n) for n in NAMES} | {name: np.array([value], np.float32)}
    return jittered_views(image, Jitter(**values))[0].numpy()


def test_an_oracle_finds_the_view_of_every_stop_and_a_deaf_model_that_of_none():
    image = pictures(1)
    (example,) = sliding_examples(Oracle(SPACE), RAW, SPACE, image, bank=64, stops=7, shown=4)
    assert [slider.name for slider in example.sliders] == list(NAMES)
    assert example.bank == 64
    assert np.array_equal(example.source, image[0].numpy())
    for slider in example.sliders:
        assert slider.neutral == 3
        assert len(slider.stops) == 7
        for stop in slider.stops:
            assert np.array_equal(example.pictures[stop.view], view(image[0], slider.name, stop.value))
            for distance in ("l2", "cosine"):
                assert len(stop.nearest[distance]) == 4
                # Half a level of rounding makes two neighbours of a slider one picture with one rank.
                assert stop.place[distance] <= 2
    (deaf,) = sliding_examples(Deaf(SPACE), RAW, SPACE, image, bank=64, stops=7)
    for slider in deaf.sliders:
        assert len({stop.nearest["l2"] for stop in slider.stops}) == 1
        assert slider.stops[3].place["l2"] < 2
        assert slider.stops[0].place["l2"] > 5


@pytest.mark.parametrize("form", ["difference", "absolute"])
def test_stops_go_over_what_training_drew_with_neutral_in_the_middle(form):
    config = tiny_config()
    actions = ActionsConfig(strength=3.0, contrast=0.0, form=form)
    config = Config(model=config.model, actions=actions, masks=config.masks, eval=config.eval)
    model, space = tiny_model(config)
    (example,) = sliding_examples(model, config, space, pictures(1), bank=16, stops=5)
    stops = {slider.name: [stop.value for stop in slider.stops] for slider in example.sliders}
    assert stops["brightness"] == pytest.approx([0, 0.5, 1, 1.6, 2.2])
    assert stops["hue"] == pytest.approx([-108, -54, 0, 54, 108])
    assert list(stops) == ["brightness", "saturation", "hue"]
    assert len({slider.stops[2].view for slider in example.sliders}) == 1  # neutral is one view
    with pytest.raises(ValueError, match="stops is 4"):
        sliding_examples(model, config, space, pictures(1), stops=4)
    still = Config(model=config.model, actions=ActionsConfig(strength=0.0), masks=config.masks)
    assert sliding_examples(model, still, space, pictures(1)) == []


def compressing(quality):
    """Return a configuration that compresses sources, and its action space."""
    groups = ("photometric", "compression")
    actions = ActionsConfig(groups=groups, strength=0.5, compression_quality=quality)
    return RAW.model_copy(update={"actions": actions}), ActionSpace(groups)


def test_a_slider_of_compression_shows_the_source_and_asks_for_the_clean_view():
    config, space = compressing((10, 80))
    image = pictures(1)
    (example,) = sliding_examples(Deaf(space), config, space, image, bank=64, stops=7)
    slider = example.sliders[-1]
    assert (slider.name, slider.unit, slider.neutral) == ("compression_quality", "quality", 0)
    assert [stop.value for stop in slider.stops] == [101, 80, 66, 52, 38, 24, 10]
    assert slider.stops[0].source is None
    assert np.array_equal(example.pictures[slider.stops[0].view], image[0].numpy())
    for stop in slider.stops[1:]:
        assert stop.view == slider.stops[0].view
        expected = reference_views.compress(image[0].numpy(), int(stop.value))
        assert np.array_equal(example.pictures[stop.source], expected)
    assert slider.stops[0].place["l2"] < 2
    card = block_html(slider_card(example, "image0"))
    data = json.loads(re.search(r'<script type="application/json">(.*)</script>', card).group(1))
    said = [stop["said"] for stop in data["sliders"][-1]["stops"]]
    assert said == ["none", *(f"{quality} quality" for quality in (80, 66, 52, 38, 24, 10))]
    assert [("source" in stop) for stop in data["sliders"][-1]["stops"]] == [False] + [True] * 6


def test_places_are_those_of_brute_force():
    config = tiny_config()
    model, space = tiny_model(config)
    image = pictures(1, seed=4)
    (example,) = sliding_examples(model, config, space, image, bank=15, stops=3, shown=15)
    with torch.no_grad():
        targets = model.targets(torch.from_numpy(example.pictures)).flatten(1).double()
        z = model.encode(image)
        for slider in example.sliders:
            for stop in slider.stops:
                shift = stop.value - (0.0 if slider.name == "hue" else 1.0)
                told = torch.from_numpy(space.vector({slider.name: shift}))[None]
                far = (model.predict(z, told).flatten(1).double() - targets).norm(dim=1)
                assert stop.place["l2"] == pytest.approx(1 + int((far < far[stop.view] - 1e-6).sum()), abs=0.5)
                assert far[list(stop.nearest["l2"])].diff().min() > -1e-5


def test_a_card_shows_the_neutral_stop_without_its_script():
    (example,) = sliding_examples(Oracle(SPACE), RAW, SPACE, pictures(1), bank=64, stops=7, shown=4)
    card = block_html(slider_card(example, "image0"))
    assert card.count('type="range"') == 4
    assert card.count(" disabled>") == 4
    assert card.count("<figure") == 2 + 2 * 4
    data = json.loads(re.search(r'<script type="application/json">(.*)</script>', card).group(1))
    assert len(data["pictures"]) == len(example.pictures)
    assert [stop["said"] for stop in data["sliders"][3]["stops"]][:4] == ["−18°", "−12°", "−6°", "0°"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Write a report with the sliders of an oracle, seven stops, and a hostile name."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(
        path,
        config=tiny_config(),
        name="<script>document.title = 'broken'</script><img src=x onerror=alert(1)>",
        step=1,
        results={},
        metrics=[],
        examples=[],
        sliding=sliding_examples(Oracle(SPACE), RAW, SPACE, pictures(2), bank=64, stops=7, shown=4),
        environment={},
    )
    return path


MOVE = """(() => {{
  const input = document.querySelectorAll(".sliders")[{card}].querySelectorAll("input")[{slider}];
  input.value = {at}; input.dispatchEvent(new Event("input"));
}})()"""
SHOWN = (
    """[...document.querySelectorAll(".sliders")[{card}].querySelectorAll("output, .place")].map(e => e.textContent)"""
)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (Debian's package chromium has it)")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (430, False), (430, True)], ids=["wide", "phone", "dark"])
def test_a_browser_moves_the_sliders_and_fetches_nothing(page, tmp_path, width, dark):
    (example, _) = sliding_examples(Oracle(SPACE), RAW, SPACE, pictures(2), bank=64, stops=7, shown=4)
    with Page(tmp_path / "profile", width, 900, dark=dark) as browser:
        browser.open(page)
        assert browser.run(SHOWN.format(card=0)) == ["×1.00", "×1.00", "×1.00", "0°", "1", "1"]
        browser.run(MOVE.format(card=0, slider=0, at=6))
        brightest = example.sliders[0].stops[6]
        places = [f"{brightest.place[distance]:g}" for distance in ("l2", "cosine")]
        assert browser.run(SHOWN.format(card=0)) == ["×1.20", "×1.00", "×1.00", "0°", *places]
        assert browser.run("document.querySelector('.asked img').naturalWidth") == 8
        browser.run(MOVE.format(card=0, slider=3, at=0))  # the others return to neutral
        assert browser.run(SHOWN.format(card=0))[:4] == ["×1.00", "×1.00", "×1.00", "−18°"]
        assert browser.run(SHOWN.format(card=1))[:4] == ["×1.00", "×1.00", "×1.00", "0°"]
        assert browser.run("document.documentElement.scrollWidth") == width  # nothing overflows a phone's screen
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        assert "<script>" in browser.run("document.title")  # the hostile name is text
        assert [address for address in browser.fetched if not address.startswith("data:")] == [page.as_uri()]
        assert browser.errors == []
        browser.screenshot(tmp_path / "shot.png")
    assert Image.open(tmp_path / "shot.png").size == (width, 900)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (Debian's package chromium has it)")
def test_a_browser_shows_the_corrupted_source_and_the_clean_one_again(tmp_path):
    config, space = compressing((10, 80))
    examples = sliding_examples(Deaf(space), config, space, pictures(1), bank=64, stops=7, shown=4)
    path = tmp_path / "report.html"
    write_report(
        path, config=config, name="a", step=1, results={}, metrics=[], examples=[], sliding=examples, environment={}
    )
    source = "document.querySelector('.source img').src"
    words = "[...document.querySelectorAll('.source figcaption, .asked figcaption')].map(e => e.textContent)"
    with Page(tmp_path / "profile") as browser:
        browser.open(path)
        clean = browser.run(source)
        browser.run(MOVE.format(card=0, slider=4, at=6))
        compressed = browser.run(source)
        assert compressed != clean
        assert browser.run(words) == ["10 quality", "clean"]
        browser.run(MOVE.format(card=0, slider=4, at=1))
        assert browser.run(source) not in (clean, compressed)
        browser.run(MOVE.format(card=0, slider=0, at=6))
        assert browser.run(source) == clean
        assert browser.run(words) == ["clean", "×1.20"]
        assert browser.errors == []


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (Debian's package chromium has it)")
def test_a_browser_runs_no_other_script_and_loads_nothing_even_where_the_page_asks_for_it(page, tmp_path):
    """The page's own policy holds: scripts injected into a copy of it do not run."""
    evil = tmp_path / "evil.html"
    evil.write_text(
        page.read_text(encoding="utf-8").replace(
            "</body>", "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png'></body>"
        ),
        encoding="utf-8",
    )
    with Page(tmp_path / "profile") as browser:
        browser.open(evil)
        assert browser.run("document.title") != "run"
        assert browser.run(SHOWN.format(card=0))[0] == "×1.00"
        assert len(browser.errors) >= 2
