"""The world model as a user holds it: what it answers is what the networks compute, and mistakes are one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import small_config
from worlds import SIDE, pictures, tiny_config, tiny_model

import iwm_fast
from iwm_fast.actions import ActionSpace, Jitter
from iwm_fast.engine import export_run, load_model, pretrain
from iwm_fast.errors import UserError
from iwm_fast.eval.bank import jittered_views, make_bank
from iwm_fast.eval.world import WorldModel
from iwm_fast.models.iwm import IWM
from iwm_fast.models.packing import Segments


@pytest.fixture(scope="module")
def world():
    config = tiny_config()
    model, space = tiny_model(config)
    return WorldModel(model, config.actions, space, chunk=3)


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "run"
    pretrain(small_config(tiny_images, train__steps=2), out)
    return out


@pytest.fixture
def exported(run, tmp_path):
    return export_run(run, tmp_path / "weights")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, iwm_fast; iwm_fast.load; sys.exit(str({'torch', 'numpy', 'PIL', 'nvidia'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_a_run_and_its_export_are_the_same_world(run, exported, tiny_images):
    files = sorted(tiny_images.rglob("*.jpg"))[:5]
    of_run, of_export = iwm_fast.load(run), iwm_fast.load(str(exported))
    images = of_run.read(files)
    assert images.shape == (5, 32, 32, 3)
    assert (of_run.step, of_export.step) == (2, 2)
    assert of_run.action_names == of_export.action_names
    told = {"brightness": 0.2, "hue": -20.0}
    assert torch.equal(of_run.predict(images, told), of_export.predict(images, told))
    for which in ("context", "target"):
        assert torch.equal(of_run.encode(images, which), of_export.encode(images, which))


def test_answers_are_those_of_the_networks(run, tiny_images):
    world = iwm_fast.load(run)
    model, config, space, _ = load_model(run)
    images = world.read(sorted(tiny_images.rglob("*.jpg"))[:4])
    bank = make_bank(config.actions, space, 0, 4)
    with torch.no_grad():
        z = model.encode(images)
        assert torch.equal(world.encode(images, "context"), z)
        assert torch.equal(world.encode(images), model.encode(images, "target"))  # the moving average by default
        assert torch.equal(world.targets(images), model.targets(images))
        predicted = model.predict(z, torch.from_numpy(bank.actions))
        torch.testing.assert_close(world.predict(images, bank.actions), predicted)
        far = (predicted[:, None].double() - model.targets(images)[None].double()).flatten(2).norm(dim=2)
    ranking = world.rank(images, bank.actions, images)
    np.testing.assert_allclose(ranking.distances, far.numpy(), rtol=1e-6)
    assert np.array_equal(ranking.order, np.argsort(far.numpy(), axis=1))
    again = world.rank(images, bank.actions, world.targets(images))
    assert np.array_equal(again.order, ranking.order)
    cosine = world.rank(images, bank.actions, images, distance="cosine").distances
    pooled = torch.nn.functional.normalize(predicted.double().mean(1), dim=1)
    wanted = torch.nn.functional.normalize(world.targets(images).double().mean(1), dim=1)
    np.testing.assert_allclose(cosine, torch.cdist(pooled, wanted).numpy(), atol=1e-6)


def test_pictures_are_taken_in_any_form(world):
    tensor = pictures(4)
    array, drawn = tensor.numpy(), [Image.fromarray(one.numpy()) for one in tensor]
    want = world.encode(tensor)
    assert world.image_size == SIDE
    for form in (array, drawn, list(array), list(tensor), tuple(drawn[:2]) + tuple(tensor[2:])):
        assert torch.equal(world.encode(form), want)
    torch.testing.assert_close(world.encode(drawn[1]), want[1:2])
    grey = Image.fromarray(array[0]).convert("L")
    torch.testing.assert_close(world.encode(grey), world.encode(np.stack([np.asarray(grey)] * 3, axis=2)))


def test_actions_are_named_or_vectors(world):
    images = pictures(2)
    vector = world.vector({"brightness": 0.2})
    want = world.predict(images, {"brightness": 0.2})
    for form in (vector, list(vector), torch.from_numpy(vector), np.stack([vector] * 2)):
        assert torch.equal(world.predict(images, form), want)
    assert not torch.equal(world.predict(images, {"brightness": -0.2}), want)
    assert not world.vector({}).any()


MISTAKES = {
    "size": (
        lambda w: w.encode(np.zeros((9, 7, 3), np.uint8)),
        r"images are uint8 \(9, 7, 3\): this model takes uint8",
    ),
    "floats": (lambda w: w.encode(torch.zeros(SIDE, SIDE, 3)), "images are float32"),
    "no image": (lambda w: w.encode([]), "images: there is none"),
    "empty batch": (lambda w: w.encode(pictures(1)[:0]), "images: there is none"),
    "encoder": (lambda w: w.encode(pictures(1), "teacher"), "which is 'teacher': it is target or context"),
    "name": (lambda w: w.predict(pictures(1), {"brightnes": 1.0}), "action: 'brightnes' is no component"),
    "length": (lambda w: w.predict(pictures(1), [1.0, 2.0]), r"action is \(2,\): it has 9 numbers \(brightness, "),
    "rows": (lambda w: w.predict(pictures(3), np.zeros((2, 9))), "action has 2 rows for 3 images"),
    "bank": (lambda w: w.rank(pictures(1), {}, torch.zeros(4, 5)), r"bank is \(4, 5\): its items are targets"),
    "distance": (lambda w: w.rank(pictures(1), {}, pictures(2), distance="l1"), "distance is 'l1'"),
    "pair": (lambda w: w.infer(pictures(2), pictures(1)), "source and target are 2 and 1 images"),
    "bounds": (lambda w: w.infer(pictures(1), pictures(1), bounds={"zoom": (0, 1)}), "action: 'zoom' is no component"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(world, name):
    act, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as told:
        act(world)
    assert "\n" not in str(told.value)


def test_a_file_that_is_no_image_is_named(world, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match=r"torn\.jpg: "):
        world.read([tmp_path / "torn.jpg"])


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def reword(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "cut short": (lambda d: cut(d / "predictor.safetensors"), "predictor.safetensors: cannot be read whole"),
    "missing": (lambda d: (d / "encoder.safetensors").unlink(), "encoder.safetensors: cannot be read whole"),
    "swapped": (
        lambda d: shutil.copy(d / "predictor.safetensors", d / "encoder.safetensors"),
        r"encoder\.safetensors: .* is not that of config.json beside it",
    ),
    "other version": (lambda d: reword(d / "config.json", schema="iwm-fast-export/9"), "schema is 'iwm-fast-export/9'"),
    "no JSON": (lambda d: cut(d / "config.json"), "config.json: cannot be read"),
    "no model": (lambda d: reword(d / "config.json", model={"patch": "x"}), "config.json: not as exported"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_export_is_one_line(exported, name):
    damage, message = DAMAGE[name]
    damage(exported)
    with pytest.raises(UserError, match=message) as told:
        iwm_fast.load(exported)
    assert "\n" not in str(told.value)


def test_a_folder_that_is_neither_run_nor_export_is_one_line(tmp_path, exported):
    with pytest.raises(UserError, match="not a run"):
        iwm_fast.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds one checkpoint"):
        iwm_fast.load(exported, checkpoint="step_000002")
    with pytest.raises(UserError, match=r"an export, which iwm_fast\.load reads"):
        load_model(exported)


def taught(steps=250, images=24):
    """A tiny model that has learned jitter: clean sources, all patches seen and asked for, a fixed random target."""
    config = tiny_config()
    space = ActionSpace()
    torch.manual_seed(0)
    model = IWM(config.model, space.dim)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    whole, patches = Segments.uniform(images, 4), torch.arange(4).repeat(images)
    for step in range(steps):
        source = pictures(images, seed=step + 1)
        bank = make_bank(config.actions, space, step, images, seed=1)
        target = torch.cat([jittered_views(x, bank.jitter.take([i])) for i, x in enumerate(source)])
        actions = torch.from_numpy(bank.actions)
        out = model(source, target, actions, patches, whole, patches, whole, loss_scale=1 / (images * 64))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return WorldModel(model, config.actions, space)


def test_the_example_brightens_and_draws(run, tiny_images, tmp_path):
    script = Path(iwm_fast.__file__).parent.parent / "examples" / "brighten.py"
    words = [run, tiny_images, "--out", tmp_path / "b.png", "--count", "8", "--queries", "2"]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 24") == 2
    assert Image.open(tmp_path / "b.png").size[0] > 500


def test_the_action_that_a_trained_model_infers_follows_the_truth():
    world = taught()
    drawn = np.random.default_rng(5).uniform(-0.35, 0.35, 16)
    found = []
    for image, value in zip(pictures(16, seed=10_000), drawn, strict=True):
        one = Jitter.neutral(1)
        view = jittered_views(image, Jitter(one.brightness + np.float32(value), one.contrast, one.saturation, one.hue))
        inferred = world.infer(image, view)
        assert inferred.distance <= inferred.distance_neutral
        assert world.vector(inferred.values) == pytest.approx(inferred.action, abs=1e-5)
        found.append(inferred.values["brightness"])
        only = world.infer(image, view, bounds={"brightness": (-0.4, 0.4)}).values
        assert {name for name, v in only.items() if v and not name.startswith("solarize")} <= {"brightness"}
    assert np.corrcoef(found, drawn)[0, 1] > 0.8
