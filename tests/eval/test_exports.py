"""`iwm-fast evaluate` and `compare` on an export: the run's numbers, without the run."""

from __future__ import annotations

import json
import os

import pytest
from small_run import small_config

from iwm_fast.cli.main import main
from iwm_fast.engine import pretrain
from iwm_fast.eval.compare.compare import compare
from iwm_fast.export.weights import export_run


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "run"
    changes = {"eval__bank": 8, "data__max_bad_fraction": 0.25, "train__seed": 7}
    pretrain(small_config(tiny_images, train__steps=2, **changes), out)
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export_run(run, tmp_path_factory.mktemp("weights") / "a")


def evaluated(place, data, out, *words):
    assert main(["evaluate", str(place), "--data", str(data), "--images", "2", "--json", str(out), *words]) == 0
    return json.loads(out.read_text())


def test_an_export_and_its_run_have_equal_json_and_the_report_says_what_is_missing(
    run, exported, tiny_images, tmp_path, capsys
):
    """The seed of the untrained network, the banks and the bound of bad images are the run's, not defaults."""
    words = ["--what", "mrr,knn,linear,equivariance"]
    before = {path.relative_to(exported) for path in exported.rglob("*")}
    ours = evaluated(run, tiny_images, tmp_path / "run.json", *words)
    capsys.readouterr()
    theirs = evaluated(exported, tiny_images, tmp_path / "export.json", *words)
    said = capsys.readouterr().err
    assert f"{exported}: an export; its report has no training curves, which the run has" in said
    differ = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differ == {"report"}
    assert ours["mrr_bank"] == 8
    assert {"knn_untrained", "mrr_shuffled", "mrr_untrained_target", "linear"} <= ours.keys()
    added = {str(path.relative_to(exported).parts[0]) for path in exported.rglob("*")} - {
        str(b.parts[0]) for b in before
    }
    assert added == {"report", "results"}
    found = compare([run, exported])
    (row,) = (row for row in found.rows if row.measure == "mrr")
    assert row.figures[0] == row.figures[1]
    assert "a: an export has no curves; name its run for these" in found.notes()


def test_overrides_and_a_folder_that_cannot_be_written_are_as_for_a_run(exported, tiny_images, tmp_path, capsys):
    found = evaluated(exported, tiny_images, tmp_path / "a.json", "--what", "mrr", "eval.bank=4")
    assert found["mrr_bank"] == 4
    assert main(["evaluate", str(exported), "--data", str(tiny_images), "train.seed=1"]) == 2
    assert "evaluate can override" in capsys.readouterr().err


REFUSED = {
    "a checkpoint": (["--checkpoint", "step_000001"], "an export has one checkpoint; leave out --checkpoint"),
    "a roll-out": (["--what", "rollout", "eval.horizon=3"], "eval.horizon: it is for roll-outs, which need triplets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_line(exported, tiny_images, capsys, case):
    words, line = REFUSED[case]
    assert main(["evaluate", str(exported), "--data", str(tiny_images), *words]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


def changed(exported, out, change):
    out.mkdir()
    for path in exported.iterdir():
        if path.is_file():
            os.link(path, out / path.name)
    described = json.loads((out / "config.json").read_text())
    change(described)
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(described))
    return out


DAMAGED = {
    "settings of another kind": (lambda d: d.update(evaluation=[1]), "not as exported (actions or evaluation)"),
    "code to import": (
        lambda d: d["evaluation"].update(plugins=["evil.py"]),
        "not as exported (actions or evaluation)",
    ),
    "a key that is unknown": (lambda d: d["evaluation"]["eval"].update(bnak=3), "eval.bnak: unknown key"),
    "no model": (lambda d: d.pop("model"), "config.json: not as exported (model: found null"),
    "graphs": (lambda d: d.update(schema="iwm-fast-graphs/1", format="onnx"), "an export in the format onnx"),
    "another library's": (lambda d: (d.clear(), d.update(model_type="ijepa")), "not an export that iwm-fast reads"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_is_not_as_exported_is_one_line(exported, tiny_images, tmp_path, capsys, case):
    change, line = DAMAGED[case]
    other = changed(exported, tmp_path / "other", change)
    assert main(["evaluate", str(other), "--data", str(tiny_images)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"iwm-fast: {other}")
    assert line in said


def test_an_export_of_an_earlier_version_is_evaluated_with_defaults(exported, tiny_images, tmp_path, capsys):
    older = changed(exported, tmp_path / "older", lambda d: [d.pop(key) for key in ("evaluation", "weights")])
    found = evaluated(older, tiny_images, tmp_path / "a.json", "--what", "mrr")
    assert found["mrr_bank"] == 256
    assert "written by an earlier version: the untrained network has the seed 0, and banks their default size" in (
        capsys.readouterr().err
    )
