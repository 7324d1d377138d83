"""Earlier evaluations stay beside later ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from worlds import tiny_config

from iwm_fast.eval.measurements import FOLDER, Measurement, divide, keep, merged, place_of, read
from iwm_fast.eval.report.report import write_report

KNN = {"encoder": "target", "pooling": "mean", "classes": 2, "train_images": 9, "test_images": 5}
KNN |= {"knn": 0.5, "knn_interval": [0.25, 0.75], "knn_chance": 0.5, "knn_k": 20, "knn_temperature": 0.07}
LINEAR = {**KNN, "linear": 0.75, "linear_interval": [0.5, 1.0], "linear_chance": 0.5, "not_run": {"mrr": "still"}}


def measured(results, data="photos", step=2, weights="a" * 16):
    return divide(results, step=step, weights=weights, data=data)


def test_each_measure_has_its_own_names_and_those_of_the_data():
    found = {one.measure: one.results for one in measured({**LINEAR, "mrr": 0.25, "h1": 0.1, "step": 2})}
    assert list(found) == ["mrr", "knn", "linear"]
    shared = {"encoder", "pooling", "classes", "train_images", "test_images"}
    assert found["mrr"].keys() == shared | {"mrr", "h1"}
    assert found["linear"].keys() == shared | {"linear", "linear_interval", "linear_chance"}


def test_another_measure_other_data_and_another_checkpoint_stay_and_a_repetition_replaces(tmp_path):
    keep(tmp_path, measured(KNN))
    keep(tmp_path, measured(LINEAR, data="others"))
    keep(tmp_path, measured(KNN, step=4, weights="b" * 16))
    keep(tmp_path, measured({**KNN, "knn": 0.625}))
    kept = {(one.step, one.measure, Path(one.data).name): one.results[one.measure] for one in read(tmp_path)}
    assert kept == {
        (2, "knn", "photos"): 0.625,
        (2, "knn", "others"): 0.5,
        (2, "linear", "others"): 0.75,
        (4, "knn", "photos"): 0.5,
    }
    document = json.loads(next((tmp_path / FOLDER).glob("step_000004-*.json")).read_text())
    assert document["schema"] == "iwm-fast-measurement/1"
    assert document["data"] == place_of("photos")
    assert "python" in document["environment"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"step": 1'])
def test_a_file_that_is_no_measurement_is_named_and_left_out(tmp_path, capsys, text):
    keep(tmp_path, measured(KNN))
    (tmp_path / FOLDER / "mine.json").write_text(text)
    assert [one.measure for one in read(tmp_path)] == ["knn"]
    assert f"{tmp_path / FOLDER / 'mine.json'}: left out of the report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("later", "kept"),
    [
        ([], [2, 4]),
        ([(4, "2026-01-02")], [2, 4]),  # the training went on
        ([(2, "2026-01-02")], [2]),  # it went on from an earlier checkpoint
        ([(0, "2026-01-02")], []),  # it began anew
        ([(0, "2026-01-02"), (4, "2026-01-03")], []),
        ([(0, "2025-12-31")], [2, 4]),
    ],
)
def test_measurements_of_weights_that_were_trained_anew_since_are_left_out_and_said(later, kept, tmp_path, capsys):
    for step in (2, 4):
        keep(tmp_path, [Measurement(step, f"{step:08d}", "knn", "/photos", "2026-01-01T12:00:00+00:00", {"knn": 0.5})])
    starts = [{"step": step, "started": f"{day}T00:00:00+00:00"} for step, day in [(0, "2025-12-30"), *later]]
    (tmp_path / "environment.json").write_text(json.dumps({"starts": starts}))
    assert [one.step for one in read(tmp_path)] == kept
    said = capsys.readouterr().err
    assert (f"results: {2 - len(kept)} measurement(s) left out" in said) == (len(kept) < 2)


def test_data_whose_name_is_no_utf8_is_kept_and_shown(tmp_path):
    name = os.fsdecode(b"/caf\xe9")
    keep(tmp_path, measured(KNN, data=name))
    assert [one.data for one in read(tmp_path)] == [name]
    page = page_of(tmp_path, subject=("a" * 16, "elsewhere"))
    assert "The representation, on caf\\udce9" in page


def page_of(run, subject, results=None):
    write_report(
        run / "page.html", config=tiny_config(), name="run", step=2, results=results or {}, measured=read(run),
        subject=subject, metrics=[], examples=[], environment={},
    )  # fmt: skip
    return (run / "page.html").read_text(encoding="utf-8")


def test_the_page_shows_all_of_the_checkpoint_with_dates_and_data_and_the_rest_in_a_table(tmp_path):
    place, weights = place_of("photos"), "a" * 16
    for measure, value, date, data, own in (
        ("linear", 0.125, "2026-11-27T10:00:00+00:00", place, weights),
        ("knn", 0.375, "2026-11-26T11:00:00+00:00", place_of("others"), weights),
        ("knn", 0.875, "2026-11-25T12:00:00+00:00", place, "b" * 16),
    ):
        results = {**KNN, "knn": value} if measure == "knn" else {**merged(measured(KNN)), "linear": value}
        only = {key: item for key, item in results.items() if measure == "knn" or not key.startswith("knn")}
        keep(tmp_path, [Measurement(2 if own == weights else 4, own, measure, data, date, only)])
    keep(tmp_path, measured({**KNN, "knn": 0.625}))
    page = page_of(tmp_path, (weights, place), {**KNN, "knn": 0.625})
    sections = dict(part.split("</h2>", 1) for part in page.split("<h2>")[1:])
    assert "62.5 %" in sections["The representation"]
    assert "12.5 %" in sections["The representation"]
    assert "linear probe 2026-11-27 10:00 UTC" in sections["The representation"]
    assert "37.5 %" in sections["The representation, on others"]
    assert f"Measured on {place_of('others')}: 2026-11-26 11:00 UTC." in sections["The representation, on others"]
    assert "87.5 %" not in page  # of another checkpoint: in the table alone
    rows = sections["All evaluations of this run"].split("<tr>")[2:]
    assert len(rows) == 4
    assert ">0.875</td>" in rows[-1]
    assert ">step 4</td>" in rows[-1]
