"""The data pipeline's benchmark: what is compared with what, and that wrong views are never timed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import reference_views as reference
from made_images import write_images
from PIL import Image

from iwm_fast.benchmarks import data
from iwm_fast.benchmarks.baselines import views as view_baselines
from iwm_fast.benchmarks.baselines.kernels import Skipped
from iwm_fast.benchmarks.baselines.views import pillow_views, torchvision_functions, torchvision_views
from iwm_fast.benchmarks.data import measure
from iwm_fast.benchmarks.parts.data_job import Job
from iwm_fast.benchmarks.plots.data import draw, table


@pytest.fixture
def job(tmp_path):
    write_images(tmp_path / "given", 6, size=(90, 80))
    return Job.of(tmp_path / "given", tmp_path / "job", size=64, batch=4, count=2)


def test_contenders_take_turns_and_are_compared_on_the_same_cores(job, tmp_path):
    cores = len(os.sched_getaffinity(0))
    document = measure(job, 2, lambda _: None)
    json.dumps(document)
    rows = {(row["contender"], row["cores"]): row for row in document["rows"]}
    assert set(rows) >= {(name, n) for name in ("iwm-fast", "iwm-fast shards", "pillow") for n in (1, cores)}
    for row in rows.values():
        assert len(row["seconds"]) == len(row["images_per_s"]) == 2
    ratio = next(r for r in document["ratios"] if r["against"] == "pillow" and r["cores"] == 1)
    ours, pillow = rows["iwm-fast", 1], rows["pillow", 1]
    expected = np.median(np.array(ours["images_per_s"]) / np.array(pillow["images_per_s"]))
    assert ratio["p50"] == pytest.approx(expected)
    assert os.sched_getaffinity(0) == set(range(cores)) or len(os.sched_getaffinity(0)) == cores
    assert "pillow" in table(document)
    draw(document, tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size[0] > 500


def test_smaller_images_keep_their_shape(tmp_path):
    write_images(tmp_path / "given", 2, size=(90, 60))
    (tmp_path / "small").mkdir()
    folder = data._smaller(tmp_path / "given", tmp_path / "small", 20)
    assert [Image.open(file).size for file in sorted(folder.iterdir())] == [(30, 20), (30, 20)]


def test_views_that_differ_from_ours_are_not_timed(job, monkeypatch):
    def wrong(path, views, row, size):
        return tuple(255 - view for view in pillow_views(path, views, row, size))

    monkeypatch.setattr(data, "pillow_views", wrong)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        measure(job, 1, lambda _: None)


def test_pillows_views_follow_from_the_parameters(job):
    """Pillow's blur uses boxes, so blurred rows may differ by more."""
    paths, views = job.drawn(1)
    for row in range(8):
        base = reference.place(np.asarray(Image.open(paths[row])), views.target_geometry, row, 64)
        source, target = pillow_views(paths[row], views, row, 64)
        assert reference.error(reference.target(base, views, row), target) <= 1
        assert reference.error(reference.source(base, views, row), source) <= (4 if views.blur_sigma[row] else 1)


def test_torchvisions_geometry_is_ours_where_it_is_installed(job):
    try:
        torchvision_functions()
    except Skipped as reason:
        pytest.skip(str(reason))
    paths, views = job.drawn(1)
    neutral = [row for row in range(job.images) if views.target.hue[row] == 0][:4]
    assert neutral
    for row in neutral:
        assert (torchvision_views(paths[row], views, row, 64)[1] == pillow_views(paths[row], views, row, 64)[1]).all()


def test_without_torchvision_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(view_baselines.importlib, "import_module", _missing)
    torchvision_functions.cache_clear()
    with pytest.raises(Skipped, match="pip install"):
        torchvision_functions()
    torchvision_functions.cache_clear()


def _missing(name):
    raise ModuleNotFoundError(name)
