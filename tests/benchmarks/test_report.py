"""docs/reference/performance.md is up to date with benchmarks/results/, and so are its pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from iwm_fast.benchmarks import report
from iwm_fast.benchmarks.parts import report_sections

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference"


def test_the_page_is_what_the_results_say():
    written = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert written == report.page(), "run python -m benchmarks.report"


def test_each_picture_is_of_its_result():
    page = report.page()
    for picture in report.pictures():
        assert f"performance/{picture}" in page
        source = report.checksum(report.RESULTS / picture.replace(".svg", ".json"))
        assert source in (DOCS / "performance" / picture).read_text(encoding="utf-8"), "run python -m benchmarks.report"


def test_a_changed_result_changes_the_page(tmp_path):
    """The program contains no number of the page."""
    results = tmp_path / "results"
    results.mkdir()
    environment = {"cpu": "c", "cores": 1, "gpus": [], "packages": {"torch": "2"}, "commit": None}
    row = {"name": "a", "images": 4, "precision": "fp32", "median_s": 0.1, "images_per_s": 40.0}
    row |= {"operations_per_image": 1e9, "mfu": None}
    file = results / "a.json"
    document = {"schema": "iwm-fast-bench-step/1", "environment": environment, "rows": [row]}
    file.write_text(json.dumps(document))
    assert "| a | 4 | fp32 | 100.0 | 40.0 | 1.00 | – |" in report.page(results)
    row["median_s"] = 0.2
    file.write_text(json.dumps(document))
    assert "| a | 4 | fp32 | 200.0 |" in report.page(results)
    (results / "other.json").write_text(json.dumps({"schema": "iwm-fast-arms/1"}))
    assert "other" not in report.page(results)


def test_every_picture_that_the_page_names_is_there():
    for name in re.findall(r"\]\((performance/[^)]+)\)", report.page()):
        assert (DOCS / name).is_file(), name


@pytest.mark.parametrize(("file", "timed"), [("README.md", True), ("docs/results/speed.md", False)])
def test_the_tables_of_the_step_against_baselines_are_the_files(file, timed):
    document = json.loads((report.RESULTS / "peers_cpu.json").read_text(encoding="utf-8"))
    text = (DOCS.parents[1] / file).read_text(encoding="utf-8")
    assert "\n".join(report_sections.peers_summary(document, timed=timed)) in text
