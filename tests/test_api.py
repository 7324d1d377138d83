"""`iwm_fast.load`: results are what the networks compute, and mistakes are one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import picture, turned
from PIL import Image
from small_run import small_config
from worlds import SIDE, pictures, tiny_config, tiny_model

import iwm_fast
from iwm_fast.actions.external import space_of
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import Jitter
from iwm_fast.api import WorldModel
from iwm_fast.config import ActionsConfig
from iwm_fast.config.external import ExternalActions
from iwm_fast.data.views.sampling import draw_views
from iwm_fast.engine import load_model, pretrain
from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.action_ranges import at_bound, trained_box
from iwm_fast.eval.world_model.bank import jittered_views, make_bank
from iwm_fast.eval.world_model.given_images import as_pictures
from iwm_fast.export.weights import export_run
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


def test_results_are_those_of_the_networks(run, tiny_images):
    world = iwm_fast.load(run)
    model, config, space, _ = load_model(run)
    images = world.read(sorted(tiny_images.rglob("*.jpg"))[:4])
    bank = make_bank(config.actions, space, 0, 4)
    with torch.no_grad():
        z = model.encode(images)
        assert torch.equal(world.encode(images, "context"), z)
        assert torch.equal(world.encode(images), model.encode(images, "target"))  # the EMA by default
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


def test_a_picture_of_pillows_is_what_its_file_would_be(world, tmp_path):
    """16 bits keep their contrast, EXIF turns the picture, and an unknown range is refused."""
    array = pictures(1).numpy()[0]
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    assert torch.equal(world.encode(deep), world.encode(np.repeat(array[..., :1], 3, axis=2)))
    (tmp_path / "a.png").write_bytes(turned(array, 6, "PNG"))
    with Image.open(tmp_path / "a.png") as opened:
        assert torch.equal(world.encode(opened), world.encode(world.read([tmp_path / "a.png"])))
    for odd, reason in ((Image.new("F", (SIDE, SIDE), 9), "floating-point"), (Image.new("I", (SIDE, SIDE)), "32-bit")):
        with pytest.raises(UserError, match=rf"images: cannot be decoded \(its pixels are {reason}"):
            world.encode(odd)


def test_actions_are_named_or_vectors(world):
    images = pictures(2)
    vector = world.vector({"brightness": 0.2})
    want = world.predict(images, {"brightness": 0.2})
    for form in (vector, list(vector), torch.from_numpy(vector), np.stack([vector] * 2)):
        assert torch.equal(world.predict(images, form), want)
    assert not torch.equal(world.predict(images, {"brightness": -0.2}), want)
    assert not world.vector({}).any()


def test_files_and_pictures_of_any_size_are_seen_as_evaluation_sees_files(world, tmp_path):
    """A turned JPEG, a wide PNG with alpha and one of 16 bits: by path, by name, opened, in a list with arrays."""
    raw = turned(picture(20, 30), 6, "JPEG")
    (tmp_path / "turned.jpg").write_bytes(raw)
    Image.fromarray(np.dstack([picture(21, 9), np.full((9, 21), 99, np.uint8)])).save(tmp_path / "wide.png")
    Image.fromarray(np.arange(15 * 13, dtype=np.uint16).reshape(13, 15) * 300).save(tmp_path / "deep.png")
    paths = [tmp_path / name for name in ("turned.jpg", "wide.png", "deep.png")]
    seen = world.read(paths)
    want = world.encode(seen)
    assert torch.equal(world.read(str(paths[1])), seen[1:2])
    for form in (paths, [str(path) for path in paths], np.array([str(path) for path in paths])):
        assert torch.equal(world.encode(form), want)
    assert torch.equal(world.encode(str(paths[0])), want[:1])
    assert torch.equal(world.encode(paths[1]), want[1:2])
    mixed = world.encode([seen[0], Image.open(paths[1]), seen[2].numpy(), paths[0], [paths[2], seen[:2]]])
    torch.testing.assert_close(mixed, want[[0, 1, 2, 0, 2, 0, 1]])
    torch.testing.assert_close(world.encode(Image.open(paths[2])), want[2:])
    levels = as_pictures(Image.open(paths[0]), SIDE).int() - seen[:1].int()  # Pillow's decoder and DALI's
    assert levels.abs().max() <= 4
    assert levels.abs().float().mean() < 1


def test_named_actions_may_be_one_per_image(world):
    both = world.predict(pictures(2), [{"brightness": 0.2}, {"hue": 10}])
    for i, action in enumerate(({"brightness": 0.2}, {"hue": 10})):
        torch.testing.assert_close(both[i], world.predict(pictures(2), action)[i])


OUTSIDE = {
    "brightness": ({"brightness": 5}, r"brightness 5, not in -0\.8 to 0\.8 factor"),
    "hue in turns of 360": ({"hue": -100.0}, r"hue -100, not in -72 to 72 degrees"),
    "sigma": ({"blur_sigma": 7}, r"blur_sigma 7, not in 0 to 2 pixels"),
    "threshold": ({"solarize_threshold": 20}, r"solarize_threshold 20, not in 128 to 256 levels"),
    "vector": ([0.5, 3.0, *[0] * 7], r"contrast 2\.4, not in -0\.8 to 0\.8 factor"),
    "two": ({"brightness": 1, "contrast": -1}, "brightness 1, .*; contrast -1, "),
}


@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.parametrize("method", ["vector", "predict", "rank"])
def test_an_action_that_training_never_sampled_gives_one_warning(world, case, method):
    action, said = OUTSIDE[case]
    calls = {"vector": (), "predict": (pictures(1),), "rank": (pictures(1),)}
    more = (pictures(2),) if method == "rank" else ()
    with pytest.warns(UserWarning, match=said) as found:
        getattr(world, method)(*calls[method], action, *more)
    assert len(found) == 1
    assert found[0].filename == __file__  # the caller's line


def test_what_training_drew_gives_no_warning(world):
    """The ends of every component, whole banks, and constants for what the configuration disabled."""
    bank = make_bank(world.actions, world.space, 0, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.vector(bank.actions)
        for action in (
            {"brightness": 0.8},
            {"hue": -72},
            {"grayscale": 1},
            {"blur_sigma": 2.0},
            {"solarize_threshold": 128},
        ):
            world.vector(action)
    config = tiny_config()
    actions = config.actions.model_copy(update={"grayscale_probability": 0.0})
    still = WorldModel(world.model, actions, world.space)
    with pytest.warns(UserWarning, match="grayscale 1, which never varied"):
        still.vector({"grayscale": True})


@pytest.mark.parametrize("groups", [("photometric",), ("photometric", "geometric"), ("photometric", "compression")])
@pytest.mark.parametrize("form", ["difference", "absolute"])
def test_every_sampled_action_lies_in_the_box(groups, form):
    actions = ActionsConfig(groups=groups, form=form)
    space = ActionSpace(groups, form)
    rows = np.arange(2000)
    size = np.stack([200 + 37 * rows % 400, 150 + 53 * rows % 300], axis=1)
    drawn = space.encode(draw_views(actions, 0, np.zeros(2000, np.int64), rows, size))
    low, high = trained_box(actions, space)
    assert (drawn >= low - 1e-4).all()
    assert (drawn <= high + 1e-4).all()
    reached = (drawn.max(axis=0) - drawn.min(axis=0)) / (high - low)
    assert reached.min() > 0.1  # the box is not so wide that everything is inside


def test_compression_is_named_by_its_quality():
    """Its flag follows, an impossible quality is one line, one outside training's range is one warning."""
    config = tiny_config()
    actions = ActionsConfig(groups=("photometric", "compression"), compression_quality=(30, 90))
    model, space = tiny_model(config.model_copy(update={"actions": actions}))
    world = WorldModel(model, actions, space)
    assert world.action_names[-2:] == ("compression", "compression_quality")
    told = world.vector({"compression_quality": 30})
    np.testing.assert_allclose(told[-2:], [1, 0.7])
    assert world.predict(pictures(1), {"compression_quality": 30}).shape[0] == 1
    assert not world.vector({"compression_quality": 101}).any()
    with pytest.warns(UserWarning, match="compression_quality 12, not in 30 to 101 quality"):
        world.vector({"compression_quality": 12})
    for quality in (0, 102, -3):
        with pytest.raises(UserError, match="a quality is from 1 to 100, or 101 for none"):
            world.vector({"compression_quality": quality})
    with pytest.raises(UserError, match="compression is 1: give compression_quality too"):
        world.vector({"compression": 1})


def external(kind, **numbers):
    config = tiny_config().model_copy(
        update={"actions": ActionsConfig(groups=("external",), external=ExternalActions(kind=kind, **numbers))}
    )
    space = space_of(config.actions)
    torch.manual_seed(0)
    model = IWM(config.model, space.dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return WorldModel(model, config.actions, space)


def test_external_actions_have_their_manifest_s_range():
    world = external("continuous", names=("push", "turn"), low=(-2, 0), high=(1, 4), neutral=(0, 0))
    with pytest.warns(UserWarning, match="turn 5, not in 0 to 4"):
        world.predict(pictures(1), {"turn": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        world.predict(pictures(1), {"push": -2, "turn": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = world.infer(*pictures(2)[:, None])
    assert found.distance < found.distance_neutral
    assert any(found.action)


def test_choices_are_one_of_them_and_all_are_tried():
    """The inferred choice for each choice's prediction is that choice."""
    world = external("discrete", names=("left", "stay", "right"))
    with pytest.raises(UserError, match="left and right are both chosen"):
        world.predict(pictures(1), {"left": 1, "right": 1})
    with pytest.raises(UserError, match="a choice is 1, and the others 0"):
        world.predict(pictures(1), {"left": 0.5})
    source, target = pictures(1), pictures(1, seed=3)
    far = [float((world.predict(source, {n: 1})[0] - world.targets(target)[0]).norm()) for n in world.action_names]
    found = world.infer(source, target)
    assert found.distance == pytest.approx(min(far))
    assert found.values == {n: float(i == int(np.argmin(far))) for i, n in enumerate(world.action_names)}
    with pytest.raises(UserError, match="infer tries every choice; leave bounds out"):
        world.infer(source, target, bounds={"left": (0, 1)})


def test_a_search_that_ends_at_its_bounds_names_the_components():
    """By hand on the box: ends of a component count, the natural ends of flags, levels and a sigma do not."""
    space = ActionSpace()
    names = ("brightness", "contrast", "hue", "grayscale", "blur_sigma")
    low, high = np.zeros(9, np.float32), np.zeros(9, np.float32)
    at = [space.names.index(name) for name in names]
    low[at], high[at] = [-1, -1, -1, 0, 0], [1, 1, 1, 1, 0.5]
    action = np.zeros(9, np.float32)
    action[at] = [1, 0.99, -1, 1, 0]
    assert at_bound(action, (low, high), space) == ("brightness", "hue")
    action[at] = [0.5, 0.5, 0.5, 0, 0.5]
    assert at_bound(action, (low, high), space) == ("blur_sigma",)


def test_infer_says_where_it_was_stopped(learned):
    image = pictures(1, seed=10_000)[0]
    one = Jitter.neutral(1)
    view = jittered_views(image, Jitter(one.brightness + np.float32(0.35), one.contrast, one.saturation, one.hue))
    with pytest.warns(UserWarning, match="infer stopped at a bound of brightness") as said:
        found = learned.infer(image, view, bounds={"brightness": (-0.1, 0.1)})
    assert len(said) == 1
    assert found.at_bound == ("brightness",)
    assert found.values["brightness"] == pytest.approx(0.1)


MISTAKES = {
    "size": (
        lambda w: w.encode(np.zeros((9, 7, 3), np.uint8)),
        r"images are uint8 \(9, 7, 3\): this model takes uint8",
    ),
    "floats": (lambda w: w.encode(torch.zeros(SIDE, SIDE, 3)), "images are float32"),
    "no image": (lambda w: w.encode([]), "images: empty"),
    "empty batch": (lambda w: w.encode(pictures(1)[:0]), "images: empty"),
    "encoder": (lambda w: w.encode(pictures(1), "teacher"), "which is 'teacher': give target or context"),
    "name": (lambda w: w.predict(pictures(1), {"brightnes": 1.0}), "action: 'brightnes': no such component"),
    "length": (lambda w: w.predict(pictures(1), [1.0, 2.0]), r"action is \(2,\): give 9 numbers \(brightness, "),
    "rows": (lambda w: w.predict(pictures(3), np.zeros((2, 9))), "action has 2 rows for 3 images"),
    "bank": (lambda w: w.rank(pictures(1), {}, torch.zeros(4, 5)), r"bank is \(4, 5\): give one or more targets"),
    "distance": (lambda w: w.rank(pictures(1), {}, pictures(2), distance="l1"), "distance is 'l1'"),
    "floats 0 to 1": (lambda w: w.encode(np.full((SIDE, SIDE, 3), 0.5)), r"these are 0 to 1: give \(255 \* x\)"),
    "normalised": (lambda w: w.encode(torch.randn(SIDE, SIDE, 3)), "are no levels: give 0 to 255 as uint8, before any"),
    "large integers": (lambda w: w.encode(np.full((SIDE, SIDE, 3), 300)), "300 to 300 are no levels 0 to 255"),
    "integers": (lambda w: w.encode(np.full((SIDE, SIDE, 3), 3)), r"images are int64 .*; convert it to uint8"),
    "channels first": (
        lambda w: w.encode(pictures(2).movedim(-1, 1)),
        r"images are uint8 \(2, 3, 8, 8\).*channels come last",
    ),
    "grey": (lambda w: w.encode(np.zeros((SIDE, SIDE), np.uint8)), "repeat the one channel three times"),
    "alpha": (lambda w: w.encode(np.zeros((SIDE, SIDE, 4), np.uint8)), r"leave alpha out: x\[\.\.\., :3\]"),
    "one of a list": (lambda w: w.encode([pictures(1)[0], pictures(1)[0].float()]), r"images\[1\] are float32"),
    "nothing": (lambda w: w.encode(None), "images: found None; give a path, a PIL image"),
    "a mapping": (lambda w: w.encode({"a": 1}), "images: found dict .*; give a path"),
    "no file": (lambda w: w.encode("nowhere.jpg"), "nowhere.jpg: no such file"),
    "a folder": (lambda w: w.encode(["."]), "a folder; name its image files"),
    "an address": (lambda w: w.read("s3://bucket/a.jpg"), "in an object store"),
    "float picture": (
        lambda w: w.encode(Image.new("F", (5, 5), 9)),
        r"images: cannot be decoded \(its pixels are floating-point numbers from 9 to 9, not in \[0, 1\]",
    ),
    "no number": (lambda w: w.predict(pictures(1), {"brightness": "much"}), "brightness is 'much'; give one number"),
    "several numbers": (lambda w: w.predict(pictures(1), {"hue": [1, 2]}), r"hue is \[1, 2\]; give one number"),
    "nan": (lambda w: w.predict(pictures(1), {"brightness": np.nan}), "brightness is nan; give a finite number"),
    "nan in a vector": (
        lambda w: w.predict(pictures(1), [0, np.inf, *[0] * 7]),
        "contrast is inf; give finite numbers",
    ),
    "half a flag": (lambda w: w.predict(pictures(1), {"grayscale": 0.5}), "grayscale is 0.5: a flag is 0 or 1"),
    "sigma": (lambda w: w.predict(pictures(1), {"blur_sigma": -1}), "blur_sigma is -1: a sigma is 0"),
    "threshold": (
        lambda w: w.predict(pictures(1), {"solarize_threshold": 300}),
        "solarize_threshold is 300: a threshold",
    ),
    "flag alone": (lambda w: w.predict(pictures(1), {"blur": 1}), "blur is 1: give blur_sigma too"),
    "flag against": (lambda w: w.predict(pictures(1), {"blur": 0, "blur_sigma": 1}), "blur is 0: blur_sigma is 1"),
    "words": (lambda w: w.predict(pictures(1), "brighter"), "action is 'brighter': give 9 numbers"),
    "none": (lambda w: w.predict(pictures(1), None), "give 9 numbers"),
    "many named": (lambda w: w.predict(pictures(3), [{"hue": 1}] * 2), "action has 2 rows for 3 images"),
    "empty bank": (lambda w: w.rank(pictures(1), {}, torch.zeros(0, 4, 16)), "bank is .*: give one or more"),
    "broken bank": (lambda w: w.rank(pictures(1), {}, torch.full((2, 4, 16), np.nan)), "bank has numbers that are not"),
    "no bounds": (lambda w: w.infer(pictures(1), pictures(1), bounds={}), "bounds: give the components to search"),
    "reversed": (lambda w: w.infer(pictures(1), pictures(1), bounds={"hue": (9, -9)}), "give the lowest first"),
    "no pair": (lambda w: w.infer(pictures(1), pictures(1), bounds={"hue": 3}), r"bounds of hue are 3: give \(lowest"),
    "nan bounds": (lambda w: w.infer(pictures(1), pictures(1), bounds={"hue": (np.nan, 1)}), "hue is nan"),
    "no folder": (lambda _: iwm_fast.load(None), "run_or_export is None: give the folder"),
    "device": (lambda _: iwm_fast.load(".", device="gpu"), "device is 'gpu': give cpu, cuda"),
    "other device": (lambda _: iwm_fast.load(".", device="cuda:99"), r"device is 'cuda:99': torch sees \d+ GPU"),
    "checkpoint": (lambda _: iwm_fast.load(".", checkpoint=3), "checkpoint is 3: give latest, or a name"),
    "pair": (lambda w: w.infer(pictures(2), pictures(1)), "source and target are 2 and 1 images"),
    "bounds": (
        lambda w: w.infer(pictures(1), pictures(1), bounds={"zoom": (0, 1)}),
        "action: 'zoom': no such component",
    ),
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
    "no JSON": (lambda d: cut(d / "config.json"), r"config.json: not as exported "),
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
    """Return a tiny model that has learned jitter: clean sources, all patches seen and predicted, a random target."""
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
        [sys.executable, str(script), *map(str, words)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 24") == 2
    assert Image.open(tmp_path / "b.png").size[0] > 500


@pytest.fixture(scope="module")
def learned():
    return taught()


@pytest.mark.filterwarnings("ignore:infer stopped at a bound")  # a tiny model takes one component for another
def test_the_action_that_a_trained_model_infers_follows_the_truth(learned):
    world = learned
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
