"""Runs side by side, from folders that hold what a run writes."""

from __future__ import annotations

import fcntl
import json
import re

import pytest
from small_run import small_config

from iwm_fast.cli.main import main
from iwm_fast.config import dump_config
from iwm_fast.errors import UserError
from iwm_fast.eval.compare import curves
from iwm_fast.eval.compare.compare import compare, write_page
from iwm_fast.eval.measurements import Measurement, keep


def run(folder, *, steps=4, of=4, batch=8, measured=None, data="/photos", step=None, **changes):
    """A run's folder after `steps` steps of `of`; measured: {measure: (value, low, high)}."""
    (folder / "checkpoints" / f"step_{steps:06d}").mkdir(parents=True)
    config = small_config("photos", train__global_batch=batch, train__schedule_steps=of, **changes)
    (folder / "config.yaml").write_text(dump_config(config))
    records = [
        {"step": s, "samples_seen": s * batch, "loss": 1.0 / s, "rank_me": 5.0, "lr": 0.1, "images_per_s": 10.0 * s}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    measure(folder, steps if step is None else step, data, measured or {})
    return folder


def measure(folder, step, data, values, **more):
    date = "2026-01-01T00:00:00+00:00"
    kept = [
        Measurement(step, f"{step:08d}", name, data, date, {name: value, f"{name}_interval": ends, **more})
        for name, (value, *ends) in values.items()
    ]
    keep(folder, kept)


@pytest.fixture(autouse=True)
def _one_curve(monkeypatch):
    """A chart takes a fifth of a second."""
    monkeypatch.setattr(curves, "_CURVES", {"loss": "loss"})


def test_only_settings_that_differ_are_shown_with_the_value_of_each(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", train__lr=0.5, batch=16)
    found = compare([tmp_path / "a", tmp_path / "b"]).document()
    assert found["differences"] == {"train.global_batch": {"a": 8, "b": 16}, "train.lr": {"a": 2e-3, "b": 0.5}}
    assert any(line == "the runs have seen different numbers of images: a 32, b 64" for line in found["notes"])


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((0.31, 0.4), "higher"), ((0.05, 0.19), "lower"), ((0.3, 0.4), "within"), ((0.1, 0.2), "within")],
)
def test_a_difference_counts_where_the_intervals_do_not_meet(tmp_path, ends, verdict):
    run(tmp_path / "a", measured={"knn": (0.25, 0.2, 0.3)})
    run(tmp_path / "b", measured={"knn": (sum(ends) / 2, *ends)})
    (row,) = compare([tmp_path / "a", tmp_path / "b"]).document()["measures"]
    assert (row["measure"], row["data"], row["verdicts"]) == ("knn", "/photos", {"a": "", "b": verdict})
    assert row["values"]["b"]["interval"] == ends


def test_the_newest_checkpoint_that_was_measured_counts_and_an_older_one_is_said(tmp_path):
    run(tmp_path / "a", measured={"knn": (0.25, 0.2, 0.3)}, step=2)
    run(tmp_path / "b", measured={"knn": (0.1, 0.0, 0.2)}, step=2)
    measure(tmp_path / "b", 4, "/photos", {"knn": (0.9, 0.8, 1.0)})
    found = compare([tmp_path / "a", tmp_path / "b"])
    (row,) = found.document()["measures"]
    assert [row["values"][name]["step"] for name in "ab"] == [2, 4]
    assert row["values"]["b"]["value"] == 0.9
    cells = found.tables()[-1][2][0]
    assert cells == ["knn", "0.2500 (0.2000 – 0.3000), step 2", "0.9000 (0.8000 – 1.0000), higher"]


def test_measures_on_other_images_are_not_compared(tmp_path):
    run(tmp_path / "a", measured={"knn": (0.25, 0.2, 0.3)})
    run(tmp_path / "b", measured={"knn": (0.9, 0.8, 1.0)}, data="/drawings")
    found = compare([tmp_path / "a", tmp_path / "b"]).document()
    assert [sorted(row["verdicts"].values()) for row in found["measures"]] == [["", ""], ["", ""]]
    assert [row[0] for row in compare([tmp_path / "a", tmp_path / "b"]).tables()[-1][2]] == [
        "knn, on photos",
        "knn, on drawings",
    ]
    assert "no two of them were evaluated on the same images: evaluate them with the same --data" in found["notes"]


def test_other_numbers_of_images_or_another_bank_give_no_verdict(tmp_path):
    for name, value, tested in (("a", 0.25, 2000), ("b", 0.9, 1000)):
        run(tmp_path / name)
        measure(tmp_path / name, 4, "/photos", {"knn": (value, value, value)}, train_images=9, test_images=tested)
        measure(tmp_path / name, 4, "/photos", {"mrr": (value, value, value)}, train_images=tested, mrr_bank=256)
    found = compare([tmp_path / "a", tmp_path / "b"]).document()
    assert {row["measure"]: row["verdicts"]["b"] for row in found["measures"]} == {
        "knn": "measured otherwise", "mrr": "higher",
    }  # fmt: skip
    assert "measured otherwise: test_images is a 2000, b 1000; evaluate them alike" in found["notes"]
    measure(tmp_path / "b", 4, "/photos", {"mrr": (0.9, 0.9, 0.9)}, mrr_bank=64)
    found = compare([tmp_path / "a", tmp_path / "b"]).document()
    assert "measured otherwise: mrr_bank is a 256, b 64; evaluate them alike" in found["notes"]


def test_how_a_run_ended_is_said(tmp_path):
    folders = [run(tmp_path / name, steps=3 if name != "done" else 4) for name in ("done", "live", "stopped", "killed")]
    (tmp_path / "stopped" / "stopped").write_text("step 3\n")
    with (tmp_path / "live" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = compare(folders).document()
    assert [one["state"] for one in found["runs"]] == ["finished", "training", "stopped", "ended early"]
    said = "\n".join(found["notes"])
    assert "live: is still training; was not evaluated" in said
    assert "killed: ended early at step 3 of 4; was not evaluated" in said


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__freeze_encoder": True, "model__target": "shared"}, "model.init"),
        ({"model__target": "frozen", "model__target_init": "a"}, "model.target_init"),
        ({}, None),
    ],
    ids=["frozen encoders", "frozen targets", "initial weights"],
)
def test_losses_in_the_spaces_of_two_frozen_encoders_are_of_different_tasks(tmp_path, changes, key):
    for name in ("a", "b"):
        own = {"model__target_init": name} if key == "model.target_init" else {}
        run(tmp_path / name, **(changes | {"model__init": name} | own))
    said = [line for line in compare([tmp_path / "a", tmp_path / "b"]).document()["notes"] if "different tasks" in line]
    assert [key is not None and key in line for line in said] == ([] if key is None else [True])


def test_losses_of_different_tasks_are_said(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", masks__target_blocks=3, model__patch=4)
    said = compare([tmp_path / "a", tmp_path / "b"]).document()["notes"]
    assert any(re.match(r"the losses are of different tasks \(.*masks\.target_blocks differ\)", line) for line in said)


def test_an_export_and_a_finetuned_result_stand_beside_a_run(tmp_path):
    one = run(tmp_path / "a", measured={"knn": (0.25, 0.2, 0.3)})
    model = small_config("x").model_dump(mode="json")["model"]
    for name, file, document in (
        ("e", "config.json", {"schema": "iwm-fast-export/1", "step": 4, "model": {**model, "patch": 4}, "actions": {}}),
        ("f", "finetune.json", {"model": model, "results": {
            "mode": "linear", "steps": 2, "splits": {"test": "photos/test"}, "top1": 0.5, "top1_interval": [0.4, 0.6],
            "curve": [{"step": 1, "loss": 2.0, "test": 0.4}, {"step": 2, "loss": 1.0, "test": 0.5}]}}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(document))
    found = compare([one, tmp_path / "e", tmp_path / "f"])
    document = found.document()
    assert [one["kind"] for one in document["runs"]] == ["run", "export", "finetuned"]
    assert document["differences"] == {"model.patch": {"a": 8, "e": 4, "f": 8}}
    assert {row["measure"] for row in document["measures"]} == {"knn", "finetuned top1"}
    page = write_page(found, tmp_path / "out").read_text()
    assert page.count("<svg") == 3  # loss, and two of finetuning
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


@pytest.mark.parametrize(("axis", "end"), [("steps", "step"), ("images", "images seen")])
def test_curves_stand_over_steps_or_images(tmp_path, axis, end):
    found = compare([run(tmp_path / "a"), run(tmp_path / "b")], axis)
    assert f'aria-label="loss over {end}"' in write_page(found, tmp_path / "out").read_text()


def test_images_are_the_axis_where_batches_differ(tmp_path):
    assert compare([run(tmp_path / "a"), run(tmp_path / "b")]).axis == "steps"
    assert compare([run(tmp_path / "c"), run(tmp_path / "d", batch=16)]).axis == "images"


def test_names_are_as_long_as_tells_them_apart_and_may_hold_anything(tmp_path):
    names = ["one/a", "two/a", "_$x$ <b>"]
    folders = [run(tmp_path / name) for name in names]
    found = compare(folders)
    assert [subject.name for subject in found.subjects] == ["one/a", "two/a", f"{tmp_path.name}/_$x$ <b>"]
    assert "<b>" not in write_page(found, tmp_path / "out").read_text()


def test_a_run_without_metrics_and_a_torn_line_are_compared_as_they_are(tmp_path):
    one, other = run(tmp_path / "a"), run(tmp_path / "b")
    (one / "metrics.jsonl").unlink()
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    found = compare([one, other]).document()
    assert [record["loss"] for record in found["runs"]] == [None, 0.25]
    assert any(line.startswith("a: has logged no metrics; was not evaluated") for line in found["notes"])


WRONG = {
    "one": (["a"], "compare: give two or more runs"),
    "twice": (["a", "a/checkpoints"], "checkpoints: given twice; name each run once"),
    "a checkpoint": (["a", "a/checkpoints/step_000004"], "a checkpoint cannot be compared, only its run: give"),
    "missing": (["a", "nope"], "nope: no such folder; name a run, an export or a finetuned result"),
    "a folder": (["a", "plain"], r"plain: no run \(no config.yaml\), no export .* and no finetuned result"),
    "torn": (["a", "torn"], r"torn/finetune\.json: damaged; write it again"),
    "list": (["a", "list"], r"list/config\.json: not a mapping"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_compared_is_one_line(what, tmp_path):
    run(tmp_path / "a")
    for name, file, text in (("plain", "x", ""), ("torn", "finetune.json", "{"), ("list", "config.json", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    names, words = WRONG[what]
    with pytest.raises(UserError, match=words) as error:
        compare([tmp_path / name for name in names])
    assert "\n" not in str(error.value)


def test_the_command_prints_tables_and_json_and_writes_its_page(tmp_path, capsys):
    paths = [str(run(tmp_path / name, measured={"knn": (0.25, 0.2, 0.3)})) for name in "ab"]
    assert main(["compare", *paths, "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert "measured: value (95 % interval)" in out
    assert out.endswith(f"page: {tmp_path}/page/index.html\n")
    assert main(["compare", *paths, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["page"]) == ("iwm-fast-compare/1", None)
