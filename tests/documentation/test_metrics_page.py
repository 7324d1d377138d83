"""docs/reference/metrics.md has every key that a run logs, that an evaluation gives and that Prometheus serves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_run import metrics, small_config

from iwm_fast.engine import pretrain
from iwm_fast.engine.metrics.prometheus import _Gauges
from iwm_fast.eval.online import OnlineEvaluator

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
LOGGED, RESULTS = PAGE.partition("## Results of evaluate")[::2]
RESULTS, PROMETHEUS = RESULTS.partition("## Prometheus")[::2]


def first_cells(text):
    """The names in backticks in the first column of the tables."""
    cells = re.findall(r"(?m)^\| (`[^|]*) \|", text)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def unknown(names, page=RESULTS):
    """Those that are no name of a table with suffixes of the table behind it."""
    cells = first_cells(page)
    suffixes = sorted((name for name in cells if name.startswith("_")), key=len, reverse=True)
    patterns = [re.escape(name).replace("NAME", r"\w+?") for name in cells if not name.startswith("_")]
    one = re.compile(rf"(?:{'|'.join(patterns)})(?:{'|'.join(suffixes)})*")
    return sorted(name for name in names if not one.fullmatch(name))


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    """Two steps with everything that adds keys: an evaluation, static shapes and a second term of the loss."""
    changes = {
        "train__steps": 2,
        "train__static_shapes": True,
        "eval__every_steps": 2,
        "eval__root": str(tiny_images),
        "eval__mrr_images": 1,
        "eval__bank": 4,
        "model__regularizer": {"kind": "vicreg"},
    }
    out = tmp_path_factory.mktemp("logged") / "run"
    pretrain(small_config(tiny_images, **changes), out, evaluator=OnlineEvaluator())
    return out


def test_every_logged_key_is_on_the_page(run):
    logged = {key for record in metrics(run) for key in record}
    assert {"loss", "knn", "padded", "first_step_after_s"} <= logged
    assert sorted(logged - first_cells(LOGGED)) == []


def test_prometheus_serves_a_gauge_for_every_key_by_the_name_on_the_page(run):
    record = metrics(run)[0]
    served = {gauge.name for gauge in _Gauges(record, "runs/a").collect()}
    assert served == {f"iwm_fast_{key}" for key, value in record.items() if value is not None}
    assert "`iwm_fast_KEY`" in PROMETHEUS


def test_every_key_of_the_page_comes_from_the_code():
    """A key that was renamed or removed is seen too. Terms of the loss are named where they are written."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "iwm_fast").rglob("*.py"))
    quoted = set(re.findall(r'"(\w+)"', code))
    terms = {name for name in first_cells(LOGGED) if name.startswith("loss_")}
    assert {name.removeprefix("loss_") for name in terms} <= quoted
    ends = ("_train", "_test", "_max")  # written as f"eval_left_out_{name}"
    assert sorted(n for n in first_cells(LOGGED) - terms - quoted if not n.endswith(ends)) == []


@pytest.mark.parametrize("name", ["photos_cpu", "dial_cpu", "games_car_cpu"])
def test_every_key_of_an_evaluation_is_on_the_page(name):
    """Of the committed results, on images, with pairs of views, and on triplets; two keys are the sweep's own."""
    document = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    keys = {key for arm in document["arms"] for run in arm["runs"] for key in run["evaluation"]}
    assert len(keys) > 20
    assert unknown(keys - {"loss_last", "rank_me"}) == []


def test_a_key_that_is_not_on_the_page_is_seen():
    assert unknown(["mrr_shuffled_cosine_interval", "r2_hue_untrained", "mrr_only_hue"]) == []
    assert unknown(["mrr_sideways", "loss"]) == ["loss", "mrr_sideways"]
    assert "loss" in first_cells(LOGGED)
