"""A finetuned result from Python: it predicts what was scored, and what it cannot predict is one line."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import small_config

import iwm_fast
from iwm_fast.api import FinetunedModel, WorldModel
from iwm_fast.data.image_list import split
from iwm_fast.data.segmentation import read_mask, split_masked
from iwm_fast.data.tools.synth import draw_dataset
from iwm_fast.engine import pretrain
from iwm_fast.errors import UserError
from iwm_fast.eval.finetune.run import Request, finetune_run
from iwm_fast.eval.finetune.scores import counts_per_image, mean_iou


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned") / "run"
    pretrain(small_config(tiny_images, train__steps=2), out)
    return out


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Seven classes of noisy colours, near to each other, so that a short training errs on some."""
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 5)):
        for label in range(7):
            folder = root / part / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                levels = random.normal(60 + 20 * label, 30, (33, 37, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(levels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    out = tmp_path_factory.mktemp("segments") / "drawn"
    draw_dataset(out, classes=2, train=24, test=11, size=32, segments=True)
    return out


@pytest.fixture(scope="module")
def made(run, colours, segments, tmp_path_factory):
    """(folder, answer) of a finetuning, each made once."""
    folder, known = tmp_path_factory.mktemp("made"), {}

    def make(mode, *kinds):
        key = "-".join((mode, *kinds))
        if key not in known:
            data = {kind: {"colours": colours, "drawn": segments}[kind] for kind in kinds}
            request = Request(mode, data, steps=6, batch=8, rates=(3e-3,))
            known[key] = folder / key, finetune_run(run, request, folder / key)
        return known[key]

    return make


MODES = ["linear", "attentive", "predictor", "end-to-end"]


def accuracy(model, data, task=None):
    _, test = split(data)
    found = model.classify([test.name(row) for row in range(len(test))], task=task)
    names = [test.classes[label] for label in test.labels]
    assert found.classes[:, 0].tolist() == [model.class_names(task).index(row[0]) for row in found.names]
    return np.mean([row[0] == name for row, name in zip(found.names, names, strict=True)]), found, names


def iou(model, data, task=None):
    _, test = split_masked(data)
    masks = np.stack([read_mask(mask, 32, test.image(row)) for row, mask in enumerate(test.masks)])
    answers = model.segment(test.images, task=task)
    assert (answers.shape, answers.dtype) == ((11, 32, 32), torch.uint8)
    return mean_iou(counts_per_image(answers.numpy(), masks, len(model.class_names(task))).sum(axis=0))


@pytest.mark.parametrize("mode", MODES)
def test_classes_are_those_that_finetune_scored(made, colours, mode):
    folder, scored = made(mode, "colours")
    model = iwm_fast.load(folder)
    assert isinstance(model, FinetunedModel)
    assert (model.mode, model.tasks, model.image_size) == (mode, {"colours": "classification"}, 32)
    top1, found, names = accuracy(model, colours)
    assert 0 < top1 < 1
    assert top1 == scored["top1"]
    assert np.mean([name in row for row, name in zip(found.names, names, strict=True)]) == scored["top5"]
    assert found.probabilities.shape == found.classes.shape == (35, 5)
    assert (np.diff(found.probabilities, axis=1) <= 0).all()
    everything = model.classify(np.zeros((32, 32, 3), np.uint8), top=7)
    assert everything.probabilities.sum() == pytest.approx(1, abs=1e-6)
    assert sorted(everything.names[0]) == [f"class_{label}" for label in range(7)]


@pytest.mark.parametrize("mode", MODES)
def test_segments_are_those_that_finetune_scored(made, segments, mode):
    folder, scored = made(mode, "drawn")
    model = iwm_fast.load(str(folder))
    assert model.tasks == {"drawn": "segmentation"}
    assert model.class_names() == ("0", "1", "2")
    assert iou(model, segments) == pytest.approx(scored["miou"], abs=1e-12)


def test_a_multitask_result_answers_each_task_as_it_was_scored(made, colours, segments):
    folder, scored = made("multitask", "colours", "drawn")
    model = iwm_fast.load(folder)
    assert model.tasks == {"colours": "classification", "drawn": "segmentation"}
    for task in ("colours", None):  # there is one of the kind, so its name may be left out
        assert accuracy(model, colours, task or "colours")[0] == scored["tasks"]["colours"]["top1"]
    assert iou(model, segments, "drawn") == pytest.approx(scored["tasks"]["drawn"]["miou"], abs=1e-12)
    assert model.classify(pictures(1)).names == model.classify(pictures(1), task="colours").names
    assert torch.equal(model.segment(pictures(2)), model.segment(pictures(2), task="drawn"))


def pictures(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)


def test_a_result_needs_nothing_of_the_run_and_encodes_as_it(made, run, colours, tmp_path):
    folder, _ = made("linear", "colours")
    shutil.copytree(folder, tmp_path / "moved")
    world, model = iwm_fast.load(run), iwm_fast.load(tmp_path / "moved")
    assert torch.equal(model.encode(pictures(3)), world.encode(pictures(3)))
    trained = iwm_fast.load(made("end-to-end", "colours")[0])
    assert not torch.equal(trained.encode(pictures(3)), world.encode(pictures(3)))
    file = next((colours / "test").rglob("*.png"))
    assert (
        model.classify(file).names == model.classify(Image.open(file)).names == model.classify(model.read(file)).names
    )
    assert model.logits(pictures(2)).shape == (2, 7)


MISTAKES = {
    "segments of a classifier": (
        "linear",
        lambda m: m.segment(pictures(1)),
        "no segmentation in this result: .*; use classify",
    ),
    "classes of a segmenter": (
        "drawn",
        lambda m: m.classify(pictures(1)),
        "no classification in this result: .*; use segment",
    ),
    "another task": ("linear", lambda m: m.classify(pictures(1), task="birds"), r"task is 'birds'; .* colours \(class"),
    "which of two": ("multitask", lambda m: m.logits(pictures(1)), "task is missing: this result has colours"),
    "too many": ("linear", lambda m: m.classify(pictures(1), top=8), "top is 8; give 1 to 7"),
    "none": ("linear", lambda m: m.classify(pictures(1), top=0), "top is 0; give 1 to 7"),
    "another size": ("linear", lambda m: m.classify(pictures(1)[:, :8]), r"images are uint8 \(1, 8, 32, 3\)"),
    "floats": ("linear", lambda m: m.classify(pictures(1).float() / 255), r"give \(255 \* x\)\.round\(\) as uint8"),
    "no file": ("linear", lambda m: m.classify("nowhere.png"), "nowhere.png"),
    "predictions": ("linear", lambda m: m.predict(pictures(1), {}), "predict: a finetuned result has no world model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(made, name):
    kind, ask, line = MISTAKES[name]
    wanted = {"drawn": ("linear", "drawn"), "multitask": ("multitask", "colours", "drawn")}
    model = iwm_fast.load(made(*wanted.get(kind, ("linear", "colours")))[0])
    with pytest.raises(UserError, match=line) as found:
        ask(model)
    assert "\n" not in str(found.value)


def test_each_kind_of_model_says_what_it_is_not(made, run):
    world, model = iwm_fast.load(run), iwm_fast.load(made("linear", "colours")[0])
    assert isinstance(world, WorldModel)
    with pytest.raises(UserError, match="classify: not a finetuned result"):
        world.classify(pictures(1))
    assert not hasattr(world, "segment")
    assert not hasattr(model, "predict")
    for one in (world, model):
        with pytest.raises(AttributeError, match="no attribute 'clasify'"):
            one.clasify  # noqa: B018


def test_a_changed_or_missing_part_is_named(made, run, tmp_path):
    folder, _ = made("attentive", "colours")
    place = tmp_path / "r"
    shutil.copytree(folder, place)
    weights, record = place / "reader.safetensors", place / "finetune.json"
    whole, said = weights.read_bytes(), record.read_text()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"reader\.safetensors: changed since finetune\.json was written"):
        iwm_fast.load(place)
    weights.unlink()
    with pytest.raises(UserError, match="an incomplete folder of iwm-fast finetune"):
        iwm_fast.load(place)
    weights.write_bytes(whole)
    for text in ("[]", "{}", "torn", said.replace('"attentive"', '"lookup"'), said.replace('"tasks": {', '"task": {')):
        record.write_text(text)
        with pytest.raises(UserError) as found:
            iwm_fast.load(place)
        assert "\n" not in str(found.value)
    earlier = json.loads(said)
    del earlier["weights"]  # as versions before wrote it
    record.write_text(json.dumps(earlier))
    assert iwm_fast.load(place).mode == "attentive"
    with pytest.raises(UserError, match="a finetuned result, which holds one state; leave out step_000002"):
        iwm_fast.load(place, checkpoint="step_000002")
    with pytest.raises(UserError, match="a finetuned result, which iwm_fast"):
        finetune_run(place, Request("linear", {"a": tmp_path}, steps=1))


def test_answers_give_no_warning(made):
    model = iwm_fast.load(made("predictor", "colours")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.classify(pictures(2))


def test_the_guide_s_python_runs(made, colours, segments, tmp_path, monkeypatch):
    """Its blocks, on results at the places that it names; its two tasks go by the names of this file's data."""
    places = {"h-photos": ("predictor", "colours"), "b-masks": ("predictor", "drawn")}
    places["b-both"] = ("multitask", "colours", "drawn")
    (tmp_path / "runs").mkdir()
    for name, made_of in places.items():
        (tmp_path / "runs" / name).symlink_to(made(*made_of)[0])
    (tmp_path / "masks").symlink_to(segments)
    for name in ("cat.jpg", "dog.jpg"):
        Image.open(colours / "test" / "class_0" / "0.png").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "finetune.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", guide)
    names: dict = {}
    for block in blocks:
        exec(block.replace("kinds", "colours").replace("parts", "drawn"), names)
    assert names["classes"].shape == (1, 32, 32)
    assert [task for _, task in sorted(names["both"].tasks.items())] == ["classification", "segmentation"]
