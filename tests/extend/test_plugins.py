"""Plugins: own modules that a configuration names, each of docs/extend as its page shows it."""

from __future__ import annotations

import json
import pickle
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import losses, metrics, small_config, state

import iwm_fast
from iwm_fast.cli.main import main
from iwm_fast.config import Config, encoders, plugins
from iwm_fast.config.load import load_config
from iwm_fast.config.plugins import load_plugins, plugin_digests
from iwm_fast.config.registry import OPTIMIZERS, SOURCES, TERMS, Registry
from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import list_images
from iwm_fast.data.sources.own import OwnSource
from iwm_fast.engine import pretrain
from iwm_fast.errors import UserError
from iwm_fast.eval import registry as evaluations

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "extend"
PAGES = sorted((ROOT / "docs" / "extend").glob("*.md"))
SHOWN = re.compile(r'^```(?:python|text) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def plugin(name: str) -> str:
    return str(EXAMPLES / f"{name}.py")


@pytest.fixture(autouse=True)
def _registered_for_one_test(monkeypatch):
    """What a test registers and imports is gone after it."""
    monkeypatch.setattr(evaluations, "_EVALUATIONS", dict(evaluations._EVALUATIONS))
    monkeypatch.setattr(plugins, "_MODULES", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    for table in (SOURCES, OPTIMIZERS, TERMS, encoders._NAMES):
        monkeypatch.setattr(table, "_own", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith((str(EXAMPLES), tempfile.gettempdir())):
            del sys.modules[name]


@pytest.fixture
def npz(tmp_path):
    """A .npz file of 16 images in 2 classes, and the images."""
    images = np.random.default_rng(5).integers(0, 256, (16, 37, 41, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(16) % 2)
    return tmp_path / "set.npz", images


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_a_page_is_the_file_that_is_tested(page):
    text = page.read_text()
    shown = SHOWN.findall(text)
    assert len(re.findall(r"^```(?:python|text)", text, re.MULTILINE)) == len(shown)
    assert shown or page.name == "index.md"
    for file, code in shown:
        there = (ROOT / file).read_text()
        if file.startswith("examples/"):
            assert code == there
        else:
            for part in code.split("\n...\n"):
                assert part.strip("\n") in there, f"{page.name}: {file} has no\n{part}"


def test_every_example_is_on_a_page():
    shown = {file for page in PAGES for file, _ in SHOWN.findall(page.read_text())}
    assert {f"examples/extend/{file.name}" for file in EXAMPLES.glob("*.py")} <= shown


# ------------------------------------------------------------------------------------------------ loading


def test_plugins_are_imported_once_and_before_the_configuration_is_checked(tmp_path):
    (tmp_path / "own_names.py").write_text(
        "from iwm_fast.config.encoders import register_encoder\n"
        "register_encoder('vit_own', depth=1, width=8, heads=2)\n"
    )
    (tmp_path / "run.yaml").write_text(f"plugins: [{tmp_path}/own_names.py]\nmodel: {{encoder: vit_own}}\n")
    for _ in range(2):
        assert load_config(tmp_path / "run.yaml").model.encoder_shape.width == 8
    assert Config.model_validate({"model": {"encoder": "vit_own"}}).model.encoder == "vit_own"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("none.py", None, "no such file; give the path of a .py file"),
        ("a-b.py", "", "a module's file is named with letters, digits and _; rename it"),
        ("broken_one.py", "import nowhere_at_all\n", "cannot be imported: ModuleNotFoundError: No module named"),
        ("broken_two.py", "x = 1\ny = x +\n", "cannot be imported: invalid syntax (.*broken_two.py, line 2)"),
        ("broken_three.py", "x = 1\nx.y\n", "AttributeError: 'int' object has no attribute 'y' (.*three.py, line 2)"),
        ("random.py", "", r"a module random is imported from .*random\.py; rename the file"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line(tmp_path, name, text, line):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"plugins: .*{name}: .*" + line.replace("(", r"\(").replace(")", r"\)")) as one:
        Config.model_validate({"plugins": [str(file)]})
    assert "\n" not in str(one.value)


def test_a_module_that_is_not_there_is_named_with_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"plugins: my_project\.data: no module my_project \(looked in {tmp_path}"):
        load_plugins(["my_project.data"])


def test_a_name_that_is_taken_or_no_name_is_refused():
    table: Registry[int] = Registry("term", "model.terms", ("prediction",))
    table.add("one", 1)
    for name, why in (("one", "registered already"), ("prediction", "is built in"), ("One", "lower-case")):
        with pytest.raises(UserError, match=why):
            table.add(name, 2)
    assert table.names == ("prediction", "one")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"data": {"source": "foldr"}},
            r'found "foldr"; allowed: one of auto, .*plugins registers \(did you mean folder\?\)',
        ),
        (
            {"train": {"optimizer": "sgd"}},
            'found "sgd"; allowed: one of adamw, lamb.*, or one that a module in plugins registers',
        ),
        ({"model": {"terms": ["nothing"]}}, 'found "nothing"; allowed: .*or one that a module in plugins registers'),
        ({"model": {"encoder": "vit_smal"}}, r"did you mean vit_small\?"),
    ],
)
def test_an_unknown_name_says_what_there_is(values, line):
    with pytest.raises(ValueError, match=line):
        Config.model_validate(values)


# ------------------------------------------------------------------------------------------------ source


def test_images_of_an_own_source_arrive_as_they_are_with_their_labels(npz):
    file, images = npz
    load_plugins([plugin("npz_source")])
    found = list_images(file, "npz")
    assert len(found) == 16
    assert found.labels.tolist() == [0, 1] * 8
    for sample in (0, 7, 15):
        header, pixels = found.read(sample).split(b"\n255\n", 1)
        assert header == b"P6\n41 37"
        assert np.array_equal(np.frombuffer(pixels, np.uint8).reshape(37, 41, 3), images[sample])


def test_another_process_opens_the_source_itself(npz):
    load_plugins([plugin("npz_source")])
    again = pickle.loads(pickle.dumps(OwnSource("npz", str(npz[0]))))
    assert again.read(3) == OwnSource("npz", str(npz[0])).read(3)


class Odd:
    """A data set whose items are of every kind."""

    def __init__(self, _root):
        self.items = [b"\xff\xd8", (np.zeros((2, 3), np.uint8), "cat"), np.zeros((2, 3)), "text", (1, 2, 3)]

    def __len__(self):
        return len(self.items) + 1

    def __getitem__(self, index):
        if index == len(self.items):
            raise FileNotFoundError("gone")
        return self.items[index]


def test_items_that_are_no_images_are_named(monkeypatch):
    monkeypatch.setattr(SOURCES, "_own", {"odd": Odd})
    source = OwnSource("odd", "nowhere")
    assert source.read(0) == b"\xff\xd8"
    assert source.read(1).startswith(b"P5\n3 2\n255\n")
    for sample, why in ((2, "is float64"), (3, "is a str; give"), (4, "tuple of 3")):
        with pytest.raises(UserError, match=f"source odd: image {sample} .*{why}"):
            source.read(sample)
    with pytest.raises(BadSample, match="FileNotFoundError: gone"):
        source.read(5)


def test_a_training_on_an_own_source_resumes_bit_for_bit_and_says_when_the_plugin_is_gone(npz, tmp_path, capsys):
    own = tmp_path / "mine.py"
    own.write_text(Path(plugin("npz_source")).read_text().replace('"npz"', '"mine"'))
    made = {"plugins": [str(own)], "data__source": "mine", "checkpoint__every_steps": 2, "train__steps": 4}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    config = small_config(npz[0], **made)
    pretrain(config, whole)
    pretrain(config, resumed, str(whole / "checkpoints" / "step_000002"))
    one, other = state(whole, 4), state(resumed, 4)
    assert all(torch.equal(one[key], other[key]) for key in one)
    starts = json.loads((resumed / "environment.json").read_text())["starts"]
    assert [start["plugins"] for start in starts] == [plugin_digests([str(own)])]
    assert len(starts[0]["plugins"][str(own)]) == 64
    del plugins._MODULES[str(own)], sys.modules["mine"]
    own.unlink()
    assert main(["pretrain", "--out", str(resumed), "--resume", "auto"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"plugins: {own}: no such file" in said


# ------------------------------------------------------------------------------------------------ term


def test_an_own_term_is_logged_and_adds_what_numpy_computes(tiny_images, tmp_path):
    plain = small_config(tiny_images, train__steps=1)
    with_term = small_config(tiny_images, train__steps=1, plugins=[plugin("centre_term")], model__terms=["centre=0.5"])
    pretrain(plain, tmp_path / "plain")
    pretrain(with_term, tmp_path / "centre")
    (record,) = metrics(tmp_path / "centre")
    assert record["loss_prediction"] == losses(tmp_path / "plain")[0]
    assert record["loss"] == pytest.approx(record["loss_prediction"] + record["loss_centre"], rel=1e-6)
    assert record["loss_centre"] > 0


def test_the_terms_value_is_that_of_numpy_without_padding():
    load_plugins([plugin("centre_term")])
    from iwm_fast.models.losses import ForwardPass
    from iwm_fast.models.objective import Objective

    tokens = torch.randn(11, 7, generator=torch.Generator().manual_seed(1))
    term = TERMS.own("centre")(None, 0.5)

    two = SimpleNamespace(images=2, image_of_token=torch.tensor([0] * 3 + [1] * 5 + [2] * 3))  # the last 3: padding
    found = ForwardPass(tokens, None, two, None, None, None, None, {}, lambda x: x)
    value = Objective([term]).values(found, [0.5])[0]
    assert float(value) == pytest.approx(0.5 * np.square(tokens[:8].numpy().mean(axis=0)).mean(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ optimizer


@pytest.mark.parametrize("bad", [False, True])
def test_lion_updates_as_its_paper_says_and_a_skipped_step_changes_nothing(bad):
    load_plugins([plugin("lion")])
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    groups = [{"params": [weight], "decayed": True, "weight_decay": 0.1}]
    optimizer = OPTIMIZERS.own("lion").kind(groups, lr=0.01, betas=(0.9, 0.99))
    w, m = np.array([1.0, -2.0, 3.0]), np.zeros(3)
    for grad in ([0.5, -1.0, 0.0], [-3.0, 0.25, 1.0]):
        weight.grad = torch.tensor(grad)
        optimizer.step()
        g = np.array(grad)
        w = w - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * w)
        m = 0.99 * m + 0.01 * g
    if bad:
        weight.grad = torch.tensor([1.0, np.nan, 1.0])
        optimizer.step()
    assert weight.detach().numpy() == pytest.approx(w, rel=1e-6)
    assert optimizer.state[weight]["exp_avg"].numpy() == pytest.approx(m, rel=1e-5)


@pytest.mark.slow
def test_an_own_optimizer_trains_at_stage_1_and_is_refused_at_stage_3(tiny_images, tmp_path):
    made = {"plugins": [plugin("lion")], "train__optimizer": "lion"}
    pretrain(small_config(tiny_images, train__steps=3, zero__stage=1, **made), tmp_path / "run")
    assert len(set(losses(tmp_path / "run"))) == 3
    with pytest.raises(ValueError, match=r"train\.optimizer lion needs zero\.stage 0, 1 or 2"):
        small_config(tiny_images, zero__stage=3, **made)


def test_an_own_optimizer_that_cannot_be_made_is_one_line(tiny_images, tmp_path):
    (tmp_path / "narrow.py").write_text(
        "from iwm_fast.engine.optimizer import FiniteAdamW, register_optimizer\n"
        "@register_optimizer('narrow')\n"
        "class Narrow(FiniteAdamW):\n"
        "    def __init__(self, params, lr):\n"
        "        super().__init__(params, lr=lr)\n"
    )
    made = {"plugins": [str(tmp_path / "narrow.py")], "train__optimizer": "narrow"}
    with pytest.raises(UserError, match=r"train\.optimizer narrow: Narrow\(.*unexpected keyword.* and \*\*opt"):
        pretrain(small_config(tiny_images, train__steps=1, **made), tmp_path / "run")


# ------------------------------------------------------------------------------------------------ encoder, evaluation


def test_an_own_encoder_trains_is_exported_and_measured_by_an_own_evaluation(tiny_images, tmp_path, capsys):
    run, answer = tmp_path / "run", tmp_path / "answer.json"
    made = {"plugins": [plugin("vit_nano")], "model__encoder": "vit_nano"}
    pretrain(small_config(tiny_images, train__steps=1, **made), run)
    assert main(["export", str(run), "--out", str(tmp_path / "weights")]) == 0
    words = ["evaluate", str(run), "--data", str(tiny_images), "--what", "spectrum", "--json", str(answer)]
    assert main([*words, f"plugins=[{plugin('spectrum')}]"]) == 0
    found = json.loads(answer.read_text())
    assert 1 <= found["spectrum"] <= 48
    assert "directions with 90 % of the variance" in (run / "report" / "index.html").read_text()
    words = ["finetune", str(run), "--data", str(tiny_images), "--mode", "linear", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "head")]) == 0
    answers = []
    for folder in ("run", "weights", "head"):  # the last two as another program does, which has no plugin
        if folder == "weights":
            encoders._NAMES._own.clear()
        model = iwm_fast.load(tmp_path / folder)
        answers.append(model.encode(np.zeros((1, 32, 32, 3), np.uint8)))
    assert torch.equal(answers[0], answers[1])
    assert answers[2].shape == answers[0].shape


def test_directions_are_those_of_a_known_spectrum():
    load_plugins([plugin("spectrum")])
    from spectrum import directions

    axes = np.diag([10.0, 10.0, 10.0, 1.0])
    assert directions(np.concatenate([axes, -axes])) == 3
