"""`iwm-fast evaluate` on a real run: what it evaluates, what it writes, and one line per mistake."""

from __future__ import annotations

import errno
import json
import re
import shutil

import pytest
from small_run import small_config

from iwm_fast.cli.main import main
from iwm_fast.engine import pretrain
from iwm_fast.eval import feature_cache
from iwm_fast.eval.measurements import divide, keep, weights_of


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    flags = {"actions__blur_probability": 0.0, "actions__solarize_probability": 0.0}
    pretrain(small_config(tiny_images, train__steps=2, eval__bank=8, **flags), out)
    return out


def refused(capsys, *words):
    assert main(["evaluate", *map(str, words)]) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("iwm-fast: ")]
    assert len(lines) == 1, shown.err
    return lines[0].removeprefix("iwm-fast: ")


def test_each_component_and_all_probes_are_measured_and_features_cached(run, tiny_images, tmp_path, capsys):
    words = ["evaluate", str(run), "--data", str(tiny_images), "--what", "mrr,knn,linear,attentive", "--images", "2"]
    found = []
    for name in ("first", "again"):
        assert main([*words, "--cache", str(tmp_path / "kept"), "--json", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name).read_text()))
        entries = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "kept").rglob("*.npy"))
        # Mean tokens and all tokens, of training and test images, of the run and of the untrained network.
        assert len(entries) == 2 * 2 * 2 * 2
        found[-1]["entries"] = entries
    assert found[0]["entries"] == found[1]["entries"]
    for key in ("mrr", "knn", "linear", "attentive", "attentive_untrained", "mrr_untrained_target", "components"):
        assert found[0][key] == found[1][key]
    parts = found[0]["components"]
    assert list(parts) == ["brightness", "contrast", "saturation", "hue", "grayscale"]
    for part in parts.values():
        assert part["h1"] <= part["h5"]
        assert part["mrr_interval"][0] <= part["mrr"] <= part["mrr_interval"][1]
        assert part["mrr_bank"] == 8
    shown = capsys.readouterr().out
    assert "MRR, grayscale alone" in shown
    assert "attentive" in shown


def test_a_configuration_that_is_not_the_runs_is_one_line(run, tiny_images, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("width: 32", "width: 64"))
    line = refused(capsys, other, "--data", tiny_images)
    assert "checkpoint of another architecture" in line
    (other / "config.yaml").write_text(text.replace("normalize_target", "normalise_target"))
    assert "did you mean model.normalize_target?" in refused(capsys, other, "--data", tiny_images)


def test_classes_that_a_split_lacks_are_one_line(run, tiny_images, tmp_path, capsys):
    for part, names in (("train", ("cold",)), ("test", ("cold", "warm"))):
        for name in names:
            shutil.copytree(tiny_images / name, tmp_path / part / name)
    shutil.copytree(tiny_images / "warm", tmp_path / "train" / "other")
    line = refused(capsys, run, "--data", tmp_path, "--what", "knn")
    assert line.startswith(f"{tmp_path / 'test'} has no image of 1 of the 2 classes of {tmp_path / 'train'} (other)")
    shutil.rmtree(tmp_path / "test" / "warm")
    shutil.rmtree(tmp_path / "test" / "cold")
    assert refused(capsys, run, "--data", tmp_path).startswith(f"{tmp_path / 'test'} is empty")


def test_a_cache_that_cannot_be_written_is_said_and_the_page_has_what_was_measured_before(
    run, tiny_images, tmp_path, capsys
):
    weights = weights_of(run / "checkpoints" / "step_000002")
    before = {"linear": 0.125, "linear_interval": [0.0, 0.25], "linear_chance": 0.5}
    keep(run, divide(before, step=2, weights=weights, data=tiny_images))
    (tmp_path / "file").write_text("")
    cache, out = tmp_path / "file" / "cache", tmp_path / "e.json"
    words = ["evaluate", run, "--data", tiny_images, "--what", "knn", "--cache", cache, "--json", out]
    assert main([*map(str, words)]) == 0
    assert f"{cache}: features are not cached (Not a directory)" in capsys.readouterr().err
    found = json.loads(out.read_text())
    assert 0 <= found["knn"] <= 1
    assert "linear" not in found
    page = (run / "report" / "index.html").read_text()
    assert "k-NN top-1" in page
    assert re.search(r"<td>linear probe top-1</td><td[^>]*>12.5 %</td>", page)


def test_figures_are_given_before_a_page_that_cannot_be_written(run, tiny_images, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "report" / "index.html"))

    monkeypatch.setattr("iwm_fast.eval.run.write_report", full)
    out = tmp_path / "new" / "e.json"
    line = refused(capsys, run, "--data", tiny_images, "--what", "knn", "--json", out)
    assert line.endswith("index.html: No space left on device: the results are written, the page is not")
    assert "knn" in json.loads(out.read_text())


def test_a_run_that_one_may_only_read_is_measured_where_its_answer_has_a_place(run, tiny_images, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("report", "cache"))
    (other / "report").write_text("in the way")
    words = [other, "--data", tiny_images, "--what", "knn"]
    assert refused(capsys, *words).startswith(f"{other / 'report'}: cannot be written: Not a directory; give --json")
    assert main(["evaluate", *map(str, words), "--json", str(tmp_path / "e.json")]) == 0
    shown = capsys.readouterr()
    assert f"{other / 'report'}: cannot be written: Not a directory; results only, no page" in shown.err
    assert json.loads((tmp_path / "e.json").read_text())["report"] is None


@pytest.mark.parametrize("words", [["--json", "file/e.json"], ["--json", "folder"]])
def test_an_answer_that_has_no_place_is_refused_before_anything_is_measured(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert refused(capsys, "no_run", "--data", "d", *words).startswith(f"--json: {words[1]}: ")


def test_the_exit_code_says_whether_all_that_was_named_was_measured(run, tiny_images, tmp_path, capsys):
    """What can be evaluated is, and is written; by default what does not apply is left out without an error."""
    for i, path in enumerate(sorted(tiny_images.rglob("*.jpg"))[:10]):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "flat" / f"{i}.jpg")
    words = ["evaluate", str(run), "--data", str(tmp_path / "flat"), "--images", "2", "eval.bank=4"]
    assert main([*words, "--what", "mrr,knn", "--json", str(tmp_path / "e.json")]) == 1
    assert "knn not run: the images have no classes" in capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())
    assert "mrr" in found
    assert list(found["not_run"]) == ["knn"]
    assert main([*words, "--what", "mrr"]) == 0


def test_splits_left_out_images_and_reduced_settings_are_in_table_json_and_report(run, tiny_images, tmp_path, capsys):
    for part in ("Train", "validation", "test"):
        shutil.copytree(tiny_images, tmp_path / "set" / part)
    (tmp_path / "set" / "Train" / "cold" / "001.jpg").write_bytes(b"torn")
    broken = f"{tmp_path}/set/Train/cold/001.jpg"
    words = ["evaluate", run, "--data", tmp_path / "set", "--what", "knn", "data.max_bad_fraction=0.1"]
    for _ in range(2):  # the second time from the cache
        assert main([*map(str, words), "--cache", str(tmp_path / "kept"), "--json", str(tmp_path / "a.json")]) == 0
        found, said = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
        assert (found["train_images"], found["test_images"], found["classes"]) == (23, 24, 2)
        assert found["splits"]["train"] == f"{tmp_path}/set/Train"
        assert found["splits"]["not_used"] == [f"{tmp_path}/set/validation"]
        assert found["left_out"]["train"]["files"] == [{"file": broken, "reason": "cannot identify image file"}]
        page = (run / "report" / "index.html").read_text()
        for text in (said, page):
            assert f"train: 1 of 24 images left out: {broken} (cannot identify image file)" in text
            assert f"not used: {tmp_path}/set/validation" in text
    line = refused(capsys, *words[1:-1])
    assert line.startswith(
        f"{tmp_path}/set/Train: 1 of 24 images cannot be used, more than data.max_bad_fraction (0.01)"
    )


def test_the_page_has_verdicts_and_what_the_default_leaves_out_or_samples(run, tiny_images, tmp_path, capsys):
    """And still has what an earlier measurement reduced, after another one has been made."""
    shutil.copytree(tiny_images, tmp_path / "set")
    words = ["evaluate", str(run), "--data", str(tmp_path / "set"), "eval.bank=4"]
    assert main([*words, "--what", "mrr", "--images", "64"]) == 0
    assert main([*words[:-1], "--what", "knn", "--json", str(run / "a.json")]) == 0
    said, page = capsys.readouterr().out, (run / "report" / "index.html").read_text()
    reduced = [line for line in said.splitlines() if " instead of " in line]
    assert [line.split(":")[0] for line in reduced] == ["mrr_images", "knn_k"]
    for line in (*reduced, "not measured by default: attentive; name them in --what, or measure all with --full"):
        assert f'<p class="soft">{line}</p>' in page
    verdict = json.loads((run / "a.json").read_text())["knn_verdict"]
    assert f'<p class="verdict">k-NN: {verdict.split(" (")[0]}</p>' in page
    assert '<p class="verdict">MRR: ' in page


def test_a_probe_without_room_is_named_and_the_others_are_measured(run, tiny_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(feature_cache, "_memory_available", lambda: 10)
    words = ["evaluate", str(run), "--data", str(tiny_images), "--what", "mrr,attentive", "--images", "1"]
    assert main([*words, "--cache", str(tmp_path / "kept"), "--cache-limit", "0"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"\nattentive not run: .*give a larger --cache-limit, another --cache, or data with few", said)
    assert "MRR: " in said
    assert not (tmp_path / "kept").exists()


def test_what_would_change_nothing_is_refused_and_an_empty_table_is_not_printed(run, tiny_images, capsys):
    data = [run, "--data", tiny_images]
    assert "--images: it is for mrr" in refused(capsys, *data, "--what", "knn", "--images", 3)
    assert "set the same value" in refused(capsys, *data, "--what", "mrr", "--images", 3, "eval.mrr_images=2")
    assert "eval.images: it is for evaluation while training" in refused(capsys, *data, "eval.images=200")
    assert main(["evaluate", *map(str, data), "--what", "rollout"]) == 1
    said = capsys.readouterr().out
    assert "rollout not run: a roll-out needs triplets; these are images" in said
    assert "iwm-fast evaluate, step" not in said
