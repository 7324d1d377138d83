from __future__ import annotations

import base64
import io
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from browser import Page, find_chromium
from PIL import Image
from worlds import RAW, Deaf, Oracle, pictures, tiny_config, tiny_model

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import PredictorConfig
from iwm_fast.eval.evaluate import evaluate_model
from iwm_fast.eval.report.charts import Bar, Line, Place, bars, curve, lines, places
from iwm_fast.eval.report.example_page import ExampleCard
from iwm_fast.eval.report.page import Charts, Fold, Picture, Table, block_html
from iwm_fast.eval.report.report import read_metrics, write_report
from iwm_fast.eval.report.slider_page import Control, Nearest, SliderCard
from iwm_fast.eval.representation.view_pairs import left_out_line
from iwm_fast.eval.splits import TensorSplit
from iwm_fast.eval.world_model.examples import ranked_examples
from iwm_fast.eval.world_model.sliders import sliding_examples

SPACE = ActionSpace()
EVIL = "<script>alert('x')</script> & \"run\""
METRICS = [
    {
        "step": s,
        "loss": 1 / s,
        "lr": 1e-3,
        "images_per_s": 100 + s,
        "rank_me": None if s < 3 else 9.0,
        "grad_norm": None,
    }
    for s in range(1, 40)
] + [{"step": 40, "mrr": 0.2, "mrr_shuffled": 0.1, "mrr_chance": 0.1, "knn": 0.5}]


@pytest.fixture(scope="module")
def results():
    config = tiny_config()
    model, space = tiny_model(config)
    images, labels = pictures(40), np.arange(40) % 2
    split = TensorSplit(images, labels, ("a", "b"))
    return evaluate_model(model, config, space, train=split, test=split, components=True)


def page(path, results, **changes):
    options = {
        "config": tiny_config(),
        "name": EVIL,
        "step": 40,
        "results": results,
        "metrics": METRICS,
        "examples": ranked_examples(Oracle(SPACE), RAW, SPACE, pictures(2), bank=16),
        "sliding": sliding_examples(Oracle(SPACE), RAW, SPACE, pictures(1), bank=16, stops=3),
        "environment": {"packages": {"torch": EVIL}},
        "date": datetime(2026, 11, 23, 12, tzinfo=UTC),
    }
    write_report(path, **(options | changes))
    return path.read_text(encoding="utf-8")


class Walk(HTMLParser):
    """Collects elements, and checks that they close in order."""

    EMPTY = ("meta", "img", "br", "path", "use", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.text += data


def walk(text):
    found = Walk()
    found.feed(text)
    assert not found.open
    return found


def test_page_is_whole_and_needs_nothing_from_elsewhere(tmp_path, results):
    text = page(tmp_path / "deep" / "report.html", results)
    found = walk(text)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"link", "iframe", "object"}
    # The page's own script and the data of one card of sliders; both are inline.
    scripts = [attributes for tag, attributes in found.elements if tag == "script"]
    assert scripts == [{"type": "application/json"}, {}]
    for _, attributes in found.elements:
        assert str(attributes.get("src", "data:")).startswith("data:image/png;base64,") or "src" not in attributes
        assert str(attributes.get("href", attributes.get("xlink:href", "#"))).startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert re.findall(r"url\((?!#)", text) == []
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_identifiers_are_unique_so_that_charts_do_not_clip_each_other(tmp_path, results):
    found = walk(page(tmp_path / "report.html", results))
    names = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in found.elements:
        for value in attributes.values():
            assert all(name in names for name in re.findall(r"url\(#([^)]+)\)", value or ""))


def test_text_is_escaped_and_results_are_shown(tmp_path, results):
    text = page(tmp_path / "report.html", results | {"not_run": {EVIL: EVIL}})
    assert "<script>alert" not in text
    words = walk(text).text
    assert words.count(EVIL) >= 4
    for key in ("mrr", "mrr_shuffled", "mrr_neutral", "mrr_chance", "mrr_cosine", "invariance", "r2_hue_untrained"):
        assert f"{results[key]:.3f}" in words
    assert f"{100 * results['knn']:.1f} %" in words
    assert f"Left out: {left_out_line(results['equivariance_left_out'])}." in words
    assert "2026-11-23 12:00 UTC" in words
    assert "min_context: 1" in words


PICTURE = Picture("data:image/png;base64,AA==", EVIL, pixels=True, asked=True)
BLOCKS = {
    "table": Table([EVIL], [[EVIL]]),
    "fold": Fold(EVIL, EVIL),
    "beside charts": Charts([], beside=Table([EVIL], [])),
    "example": ExampleCard(EVIL, EVIL, 2, [(EVIL, [PICTURE])]),
    "sliders": SliderCard(
        [Control(EVIL, EVIL, 2, 1, EVIL)], PICTURE, PICTURE, [Nearest(EVIL, EVIL, EVIL, [PICTURE])], 2, {EVIL: [EVIL]}
    ),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_no_block_takes_text_for_markup(block):
    text = block_html(block)
    assert "<script>alert" not in text
    assert EVIL in walk(text).text
    data = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert [json.loads(part) for part in data] == ([{EVIL: [EVIL]}] if isinstance(block, SliderCard) else [])


def test_pictures_are_those_of_the_example(tmp_path, results):
    (example,) = ranked_examples(Oracle(SPACE), RAW, SPACE, pictures(1), bank=16, shown=4)
    found = walk(page(tmp_path / "report.html", results, examples=[example], sliding=[]))
    data = [a["src"].split(",", 1)[1] for tag, a in found.elements if tag == "img"]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(d)))) for d in data]
    assert len(shown) == 2 + 4 + 2 + 2
    assert np.array_equal(shown[0], example.source)
    assert np.array_equal(shown[1], example.target)
    assert np.array_equal(shown[2], example.target)  # the oracle ranks it first
    assert ("figure", {"class": "true"}) in found.elements


def test_each_component_has_its_bank_and_chance_in_the_report(results, tmp_path):
    text = page(tmp_path / "r.html", {**results, "attentive": 0.625, "attentive_interval": [0.6, 0.65]})
    assert results["components"].keys() >= {"brightness", "hue", "blur"}
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td[^>]*>([^<]*)</td>", text))
    for name, part in results["components"].items():
        assert rows[name] == f"{part['mrr']:.3f}"
    assert rows["attentive probe top-1"] == "62.5 %"


def test_what_was_not_measured_is_left_out(tmp_path):
    words = walk(page(tmp_path / "report.html", {}, metrics=[], examples=[], sliding=[])).text
    assert "The world model" not in words
    assert "invariant" not in words
    assert "One action component along its range" not in words
    assert "Training" not in words
    assert "Configuration" in words


def test_examples_rank_the_truth_first_for_an_oracle_and_not_for_a_deaf_model():
    images = pictures(2)
    for example in ranked_examples(Oracle(SPACE), RAW, SPACE, images, bank=16, shown=6):
        assert example.rank == 1
        assert example.rank_shuffled > 1
        assert [view.place for view in example.ranked] == [1, 2, 3, 4, 5, 6]
        assert [view.true for view in example.ranked] == [True] + [False] * 5
        assert len(example.shuffled) == len(example.neutral) == 3
        assert 0.8 <= example.action["brightness"] <= 1.2
    for example in ranked_examples(Deaf(SPACE), RAW, SPACE, images, bank=16):
        assert example.rank == example.rank_shuffled == example.rank_neutral


def test_examples_are_those_that_mrr_measures():
    config = tiny_config(predictor=PredictorConfig(depth=1, width=16, heads=2, conditioning="feature"))
    model, space = tiny_model(config)
    found = evaluate_model(model, config, space, test=TensorSplit(pictures(3)), what=("mrr",), images=3)
    examples = ranked_examples(model, config, space, pictures(3), bank=16)
    assert found["mrr_images"] == 3
    assert all(1 <= e.rank <= 16 for e in examples)


def test_charts_are_sound_svg_coloured_by_the_page():
    for svg in (
        curve(METRICS, {"loss": "loss"}, name="loss", label="loss"),
        bars([Bar("a < b & c", 0.5, (0.4, 0.6)), Bar("none", 0.0)], name="bars", label="share"),
        places(
            [Place("here <", 0.5, 0.4, (0.4, 0.6), (0.3, 0.5)), Place("there", 0.9, 0.1, (0.8, 0.95), (0.0, 0.2))],
            name="places",
            x_label="along",
            y_label="up",
        ),
        lines([1, 2], [Line("a < b", [1, 2], [(0, 2), (1, 3)])], name="lines", across="horizon", label="error"),
    ):
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg")
        assert "width" not in root.attrib
        assert "currentColor" in svg
        assert "#ffffff" not in svg  # no background: the page's shows through
        assert "#010203" not in svg
        assert "metadata" not in svg
    assert curve([{"step": 1, "loss": None}], {"loss": "loss"}, name="loss", label="loss") is None


def test_metrics_of_a_killed_run_are_read_up_to_the_torn_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    assert [r["step"] for r in read_metrics(file)] == [1, 2]
    assert read_metrics(tmp_path / "none.jsonl") == []


# Text of cells that extend past the screen, and of cells without a column name before them.
HIDDEN = """[...document.querySelectorAll("td")].filter(cell => cell.textContent
  && (cell.getBoundingClientRect().left < 0 || cell.getBoundingClientRect().right > innerWidth
    || cell.scrollWidth > cell.clientWidth)).map(cell => cell.textContent)"""
UNNAMED = """[...document.querySelectorAll("td:not(:first-child)")].filter(cell => cell.textContent
  && getComputedStyle(cell, "::before").content === "none").map(cell => cell.textContent)"""


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here (Debian's package chromium has it)")
def test_a_phone_shows_every_column_with_its_name(results, tmp_path):
    page(tmp_path / "r.html", results)
    with Page(tmp_path / "profile", 360, 900) as browser:
        browser.open(tmp_path / "r.html")
        assert browser.run("document.querySelectorAll('td').length") > 50
        assert browser.run(HIDDEN) == []
        assert browser.run(UNNAMED) == []
        assert browser.run("document.documentElement.scrollWidth") == 360
