"""The whole command on a real run: its results, what it saves, and its errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import small_config

from iwm_fast.cli.main import main
from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import split
from iwm_fast.data.segmentation import read_mask, split_masked
from iwm_fast.data.tools.synth import draw_dataset
from iwm_fast.engine import pretrain
from iwm_fast.errors import UserError
from iwm_fast.eval.finetune import load_finetuned
from iwm_fast.eval.finetune.run import named_folders


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune") / "run"
    pretrain(small_config(tiny_images, train__steps=3), out)
    return out


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    out = tmp_path_factory.mktemp("segments") / "drawn"
    draw_dataset(out, classes=2, train=120, test=30, size=32, segments=True)
    return out


def finetune(*words):
    return main(["finetune", *map(str, words)])


def answered(path):
    found = json.loads(path.read_text())
    assert found["schema"] == "iwm-fast-finetune/1"
    assert "torch" in found["environment"]["packages"]
    return found


@pytest.mark.parametrize("mode", ["linear", "attentive", "predictor", "end-to-end"])
def test_a_mode_learns_writes_json_and_saves_what_predicts_again(run, tiny_images, tmp_path, mode, capsys):
    words = ["--mode", mode, "--data", tiny_images, "--steps", 30, "--batch", 8, "--lr", "3e-3"]
    assert finetune(run, *words, "--out", tmp_path / "kept", "--json", tmp_path / "a.json") == 0
    found = answered(tmp_path / "a.json")
    shown = capsys.readouterr()
    assert "top-1" in shown.out
    curve = found["curve"]
    assert curve[-1]["test"] == found["top1"]
    assert (curve[-1]["step"], curve[-1]["epoch"]) == (30, found["epochs"])
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert found["curve_test_images"] == {tiny_images.name: 5}
    point = curve[1]
    line = f"finetune, {mode}: step {point['step']} of 30: loss {point['loss']:.4f}, test top-1 {point['test']:.1%}"
    assert line.removesuffix("%") in shown.err
    assert f"report: {tmp_path / 'kept' / 'report' / 'index.html'}" in shown.out
    page = (tmp_path / "kept" / "report" / "index.html").read_text()
    assert page.count("<svg") == 2
    assert f"{100 * found['top1']:.1f} %" in page
    assert (found["mode"], found["steps"], found["lr"]) == (mode, 30, 3e-3)
    rows = found["train_images"]  # three batches of equal size per epoch, of at most the 8 that were asked for
    assert (found["batch"], found["epochs"]) == (-(-rows // 3), 10.0)
    assert found["top1"] >= 0.8  # blue and orange, of five test images
    assert found["top1_interval"][0] <= found["top1"] <= found["top1_interval"][1]
    assert (found["train_images"], found["held_out_images"], found["test_images"]) == (17, 2, 5)
    assert found["predictor_lr"] == (pytest.approx(3e-4) if mode in ("predictor", "end-to-end") else None)
    kept = load_finetuned(tmp_path / "kept")
    weights = load_file(tmp_path / "kept" / "reader.safetensors")
    learned = sum(p.numel() for name, p in weights.items() if not name.startswith("encoder.") and "running" not in name)
    assert found["trained_parameters"] >= learned - 1  # num_batches_tracked is no parameter
    assert kept.classes == {tiny_images.name: ("cold", "warm")}
    _, test = split(tiny_images)
    images = torch.cat([part.images for part in load_clean(test, 32, threads=1)])
    accuracy = (kept(images).argmax(dim=1).numpy() == test.labels).mean()
    assert accuracy == pytest.approx(found["top1"])
    record = json.loads((tmp_path / "kept" / "finetune.json").read_text())
    assert "torch" in record["environment"]["packages"]
    assert record["results"]["top1"] == found["top1"]
    assert not list(tmp_path.glob(".*"))


def test_the_result_is_the_same_each_time_and_another_seed_begins_otherwise(run, tiny_images, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["--mode", "predictor", "--init", "random", "--data", tiny_images, "--steps", 2, "--seed", seed]
        assert finetune(run, *words, "--out", tmp_path / name) == 0
    a, b, c = (load_file(tmp_path / name / "reader.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["predictor.proj.weight"], c["predictor.proj.weight"])


def test_segments_are_learned_from_masks(run, segments, tmp_path):
    """The folder's layout determines the task; predicting background everywhere is the score to beat."""
    words = ["--mode", "attentive", "--data", segments, "--epochs", 40, "--batch", 16, "--lr", "3e-3"]
    assert finetune(run, *words, "--out", tmp_path / "kept", "--json", tmp_path / "s.json") == 0
    found = answered(tmp_path / "s.json")
    _, test = split_masked(segments)
    masks = np.stack([read_mask(mask, 32, test.image(row)) for row, mask in enumerate(test.masks)])
    floor = (masks == 0).mean() / found["classes"]
    assert (found["task"], found["classes"], found["test_images"]) == ("segmentation", 3, 30)
    assert found["miou"] > floor + 0.08
    assert found["miou_interval"][0] <= found["miou"] <= found["miou_interval"][1]
    kept = load_finetuned(tmp_path / "kept")
    images = torch.cat([part.images for part in load_clean(test.images, 32, threads=1)])
    assert kept(images).shape == (30, 3, 4, 4)
    assert kept.classes == {"drawn": ("0", "1", "2")}


def test_one_predictor_learns_classes_and_segments_together(run, tiny_images, segments, tmp_path):
    data = ["--data", f"colours={tiny_images}", "--data", f"train={segments}"]
    words = ["--mode", "multitask", *data, "--steps", 40, "--batch", 8, "--lr", "3e-3"]
    assert finetune(run, *words, "--out", tmp_path / "kept", "--json", tmp_path / "m.json") == 0
    found = answered(tmp_path / "m.json")
    assert set(found["tasks"]) == {"colours", "train"}
    colours, drawn = found["tasks"]["colours"], found["tasks"]["train"]
    assert found["mean"] == pytest.approx((colours["top1"] + drawn["miou"]) / 2)
    assert found["curve"][-1]["test"] == found["mean"]
    page = (tmp_path / "kept" / "report" / "index.html").read_text()
    assert all(f"{name}: {measure}" in page for name, measure in (("colours", "top-1"), ("train", "mIoU")))
    assert colours["top1"] >= 0.8
    kept = load_finetuned(tmp_path / "kept")
    assert kept(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "train").shape == (2, 3, 4, 4)
    assert kept(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 2)


def refused(capsys, *words):
    assert finetune(*words) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("iwm-fast: ")]
    assert len(lines) == 1, shown.err
    assert shown.out == ""
    return lines[0].removeprefix("iwm-fast: ")


def test_mistakes_are_one_line_each(run, tiny_images, segments, tmp_path, capsys):
    data = ["--data", tiny_images]
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(tiny_images.rglob("*.jpg"))[:4]):
        shutil.copy(path, flat / f"{i}.jpg")
    for words, line in (
        ([run, *data, "--mode", "probe"], "--mode probe: give one of linear, attentive, predictor"),
        ([run, *data, "--mode", "linear", "--init", "random"], "--init: mode linear has no predictor"),
        ([run, *data, "--init", "none"], "--init none: give one of pretrained, random"),
        ([run, *data, "--lr", "fast"], "--lr fast: give a number"),
        ([run, *data, "--lr", ","], "--lr ,: give a number"),
        ([run, *data, "--lr", "-1"], "--lr -1: give a learning rate above 0"),
        ([run, *data, "--lr", "1e-3,nan"], "--lr nan: give a learning rate above 0"),
        ([run, *data, "--lr", "inf"], "--lr inf: give a learning rate above 0"),
        ([run, *data, *data], "--data "),
        ([run, *data, "--data", f"b={segments}"], "--data: 2 tasks need --mode multitask"),
        ([run, *data, "--out", tmp_path / "there"], f"{tmp_path / 'there'}: exists already; choose another --out"),
        ([run, "--data", tmp_path / "empty"], f"{tmp_path / 'empty'} is empty"),
        ([run, "--data", flat], f"{flat}: the images have no classes"),
        ([run, *data, "--task", "segmentation"], f"{tiny_images} has no images/ and masks/"),
        ([tmp_path / "empty", *data], f"{tmp_path / 'empty'}: not a run (no config.yaml)"),
        ([run, *data, "--checkpoint", "step_000099"], f"{run / 'checkpoints' / 'step_000099'}: "),
    ):
        assert refused(capsys, *words).startswith(line)


def test_classes_that_the_test_split_lacks_are_named(run, tiny_images, tmp_path, capsys):
    for part, names in (("train", ("cold", "warm")), ("test", ("cold",))):
        for name in names:
            shutil.copytree(tiny_images / name, tmp_path / part / name)
    (tmp_path / "test" / "more").mkdir()
    shutil.copy(next((tiny_images / "warm").iterdir()), tmp_path / "test" / "more" / "new.jpg")
    line = refused(capsys, run, "--data", tmp_path, "--mode", "linear")
    assert line.startswith(f"{tmp_path / 'test'} has no image of 1 of the 2 classes of {tmp_path / 'train'} (warm)")
    shutil.rmtree(tmp_path / "test" / "more")
    line = refused(capsys, run, "--data", tmp_path, "--mode", "linear")
    assert line.startswith(f"{tmp_path / 'test'}: no class folders")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("missing", "missing; each image of"),
        ("colours", "has mode RGB; a mask is a PNG of one channel"),
        ("size", r"is 16 × 16 pixels, its image 32 × 32"),
        ("torn", "cannot be decoded as a mask"),
    ],
)
def test_a_mask_that_cannot_be_one_is_named(run, segments, tmp_path, capsys, harm, words):
    shutil.copytree(segments, tmp_path / "drawn")
    path = tmp_path / "drawn" / "train" / "masks" / "00003.png"
    if harm == "missing":
        path.unlink()
    elif harm == "torn":
        path.write_bytes(path.read_bytes()[:60])
    else:
        mask = Image.open(path)
        (mask.convert("RGB") if harm == "colours" else mask.resize((16, 16))).save(path)
    line = refused(capsys, run, "data.max_bad_fraction=0", "--data", tmp_path / "drawn", "--mode", "linear")
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize(
    ("levels", "words"), [((0, 255), "have only class 0"), ((255, 255), "have no class")], ids=["0 and 255", "255"]
)
def test_masks_of_one_class_teach_nothing(run, segments, tmp_path, capsys, levels, words):
    shutil.copytree(segments, tmp_path / "drawn")
    for part in ("train", "test"):
        for path in (tmp_path / "drawn" / part / "masks").iterdir():
            Image.fromarray(np.where(np.asarray(Image.open(path)), *levels[::-1]).astype(np.uint8)).save(path)
    line = refused(capsys, run, "--data", tmp_path / "drawn", "--mode", "linear", "--steps", 1)
    assert f"{tmp_path / 'drawn'}: its 120 training masks {words} (255 is ignored)" in line


def test_test_masks_without_a_class_cannot_be_scored(run, segments, tmp_path, capsys):
    shutil.copytree(segments, tmp_path / "drawn")
    for path in (tmp_path / "drawn" / "test" / "masks").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    line = refused(capsys, run, "--data", tmp_path / "drawn", "--mode", "linear", "--steps", 1)
    assert "of its 30 test masks too few have a pixel that is not 255" in line


def test_a_mask_that_cannot_be_used_is_left_out_aloud_below_the_limit(run, segments, tmp_path, capsys):
    shutil.copytree(segments, tmp_path / "drawn")
    path = tmp_path / "drawn" / "train" / "masks" / "00003.png"
    path.unlink()
    words = [run, "--data", tmp_path / "drawn", "--mode", "linear", "--steps", 1, "--json", tmp_path / "a.json"]
    assert finetune(*words) == 0  # 1 of 120, and the limit is one in a hundred
    found = answered(tmp_path / "a.json")
    left_out = found["left_out"]["train"]
    assert (left_out["count"], left_out["of"], found["train_images"] + found["held_out_images"]) == (1, 120, 119)
    assert left_out["files"][0]["file"] == str(path)
    assert "missing; each image of" in left_out["files"][0]["reason"]
    assert f"train: 1 of 120 images left out: {path} ({path}: missing" in capsys.readouterr().out


def test_a_path_may_have_an_equals_sign_and_a_task_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("date=1/d", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    assert named_folders(["date=1/d"]) == {"d": "date=1/d"}
    assert named_folders([f"{tmp_path}/date=1/d"]) == {"d": f"{tmp_path}/date=1/d"}
    assert named_folders(["a=date=1/d", "b=plain"]) == {"a": "date=1/d", "b": "plain"}
    assert named_folders(["s3://bucket/date=1/d", "n=s3://bucket/date=2"]) == {
        "d": "s3://bucket/date=1/d",
        "n": "s3://bucket/date=2",
    }
    (tmp_path / "1" / "d").mkdir(parents=True)
    with pytest.raises(UserError, match=r"write \./date=1/d for the first, date=\./1/d for the second"):
        named_folders(["date=1/d"])
    assert named_folders(["./date=1/d", "date=./1/d"]) == {"d": "./date=1/d", "date": "./1/d"}


def test_images_are_left_out_aloud_and_settings_reduced_aloud(run, tiny_images, tmp_path, capsys):
    for part in ("train", "Val"):
        shutil.copytree(tiny_images, tmp_path / "set" / part)
    broken = tmp_path / "set" / "Val" / "warm" / "000.jpg"
    broken.write_bytes(b"torn")
    words = [run, "--data", tmp_path / "set", "--mode", "linear", "--steps", 1]
    line = refused(capsys, *words)
    assert line.startswith(f"{tmp_path / 'set' / 'Val'}: 1 of 24 images cannot be used")
    assert finetune(*words, "data.max_bad_fraction=0.1", "--limit", 99, "--json", tmp_path / "f.json") == 0
    found, said = answered(tmp_path / "f.json"), capsys.readouterr().out
    assert found["splits"]["test"] == str(tmp_path / "set" / "Val")
    assert found["left_out"]["test"]["files"] == [{"file": str(broken), "reason": "cannot identify image file"}]
    assert (found["test_images"], found["epochs"]) == (23, 1.0)
    assert found["reduced"]["limit"] == {"asked": 99, "used": 24, "why": "there are 24 training images"}
    assert found["reduced"]["batch"]["used"] == found["train_images"] == 22
    few = tmp_path / "few"
    shutil.copytree(tiny_images, few / "train")
    shutil.copytree(tiny_images, few / "test")
    for path in sorted((few / "train" / "warm").iterdir())[1:]:
        path.unlink()
    assert finetune(run, "--data", few, "--mode", "linear", "--steps", 1, "--limit", 4) == 0
    assert "classes: 1 instead of 2: --limit 4 leaves 1 of them without a training image" in capsys.readouterr().out
    for words in (f"test: 1 of 24 images left out: {broken} (", "limit: 24 instead of 99", "Val"):
        assert words in said


def test_what_was_saved_and_then_damaged_is_not_loaded(run, tiny_images, tmp_path):
    words = ["--mode", "linear", "--data", tiny_images, "--steps", 1]
    assert finetune(run, *words, "--out", tmp_path / "kept") == 0
    weights = tmp_path / "kept" / "reader.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="an incomplete folder of iwm-fast finetune"):
        load_finetuned(tmp_path / "kept")
    weights.write_bytes(whole)
    assert load_finetuned(tmp_path / "kept").results["mode"] == "linear"
    record = tmp_path / "kept" / "finetune.json"
    record.write_text(record.read_text().replace("iwm-fast-finetuned/1", "iwm-fast-finetuned/9"))
    with pytest.raises(UserError, match="schema is 'iwm-fast-finetuned/9'"):
        load_finetuned(tmp_path / "kept")
