"""The table of evaluations: every entry works, and an added one appears in help, JSON, terminal and page."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from small_run import small_config
from worlds import pictures, tiny_config, tiny_model

from iwm_fast.cli.main import main
from iwm_fast.config.schema_table import rows
from iwm_fast.engine import pretrain
from iwm_fast.errors import UserError
from iwm_fast.eval import registry
from iwm_fast.eval.evaluate import evaluate_model
from iwm_fast.eval.measurements import divide
from iwm_fast.eval.overrides import check_overrides
from iwm_fast.eval.registry import (
    CannotRunError,
    Evaluation,
    Measure,
    evaluations,
    full_help,
    measure,
    names,
    needed,
    register,
    unusual,
    usual,
    what_help,
)
from iwm_fast.eval.report.drawing import Drawing, drawing_of, drawings
from iwm_fast.eval.report.terminal import result_rows
from iwm_fast.eval.splits import TensorSplit

KINDS = ("images", "triplets")


def share_of_bright(subject):
    """A made-up evaluation: the share of test images that are brighter than the training images."""
    train = subject.learned_from().spread(9)
    share = float(np.mean(subject.test.spread(9).float().mean(dim=(1, 2, 3)).numpy() > float(train.float().mean())))
    return {
        "bright": share,
        "bright_interval": [share / 2, (1 + share) / 2],
        "bright_chance": 0.5,
        "bright_protocol": "the share of <bright> images",
    }


MADE_UP = Evaluation(
    "bright",
    "brightness of images",
    images=Measure(share_of_bright, ("training images",), ("eval.horizon",)),
    elsewhere="frames have no brightness",
    quick=False,
)


@pytest.fixture
def made_up(monkeypatch):
    """Add one entry to the table for a test."""
    monkeypatch.setattr(registry, "_EVALUATIONS", dict(registry._EVALUATIONS))
    register(MADE_UP)


@pytest.mark.parametrize("one", evaluations(), ids=lambda one: one.name)
def test_every_entry_runs_somewhere_is_drawn_and_names_keys_of_the_configuration(one):
    keys = {row.key for row in rows()}
    ways = [one.on(kind) for kind in KINDS if one.on(kind) is not None]
    assert ways
    assert len(ways) == len(KINDS) or one.elsewhere
    for how in ways:
        assert callable(pkgutil.resolve_name(how.run))
        assert set(how.settings) <= keys
    assert isinstance(drawing_of(one.name), Drawing)
    assert one.owns(one.name)


def test_what_is_measured_by_default_and_where():
    assert usual("images") == ("mrr", "knn", "linear", "equivariance")
    assert usual("triplets") == ("mrr", "rollout")
    assert (unusual("images"), unusual("triplets")) == (("attentive",), ())
    assert what_help().endswith("Default of images: mrr, knn, linear, equivariance; of triplets: mrr, rollout.")
    assert "also attentive (images); and rank each action component alone on all images" in full_help()
    assert names() == ("mrr", "knn", "linear", "attentive", "equivariance", "rollout")
    assert needed(("mrr", "linear"), "images") == {"jitter", "classes"}
    assert needed(("mrr", "linear"), "triplets") == set()


def test_a_name_has_one_owner():
    for key in ("mrr_chance", "h1", "components", "knn_plain", "r2_hue", "cosine_same", "rollout"):
        assert len([one for one in evaluations() if one.owns(key)]) == 1
    assert not [one for one in evaluations() if one.owns("encoder") or one.owns("train_images")]


def test_a_name_that_is_taken_is_refused(made_up):
    with pytest.raises(ValueError, match="there is an evaluation 'bright' already"):
        register(MADE_UP)


def test_an_evaluation_without_room_does_not_stop_the_others(made_up):
    def no_room(_):
        raise CannotRunError("no room")

    register(Evaluation("large", "large", images=Measure(no_room)))
    register(Evaluation("small", "small", images=Measure(lambda _: {"small": 1.0})))
    assert measure(("large", "small"), "images", None) == {"not_run": {"large": "no room"}, "small": 1.0}


def test_probes_share_a_section_and_others_have_their_own(made_up):
    assert [drawing.names for drawing in drawings()] == [
        ("mrr",),
        ("knn", "linear", "attentive"),
        ("equivariance",),
        ("rollout",),
        ("bright",),
    ]


def test_help_names_an_evaluation_that_was_added_and_loads_no_torch():
    code = (
        "import sys\nfrom iwm_fast.eval.registry import Evaluation, Measure, register\n"
        "register(Evaluation('bright', 'brightness', images=Measure('nowhere:nothing')))\n"
        "from iwm_fast.cli.main import main\nmain(['evaluate', '--help'])\n"
        "sys.exit(f'loaded: {heavy}' if (heavy := {'torch', 'numpy', 'matplotlib'} & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "Images: mrr, knn, linear, attentive, equivariance, bright; triplets: mrr, rollout." in words


class Text(HTMLParser):
    """A page's text, section by section."""

    def __init__(self, page):
        super().__init__()
        self.sections = [""]
        self.feed(page)

    def handle_starttag(self, tag, attrs):  # noqa: ARG002  (the base class names it so)
        if tag == "section":
            self.sections.append("")

    def handle_data(self, data):
        self.sections[-1] += f" {data.strip()}" if data.strip() else ""


def test_an_evaluation_that_is_added_is_in_json_terminal_page_and_all_that_was_measured(
    made_up, tiny_images, tmp_path, capsys
):
    run, answer = tmp_path / "run", tmp_path / "answer.json"
    pretrain(small_config(tiny_images, train__steps=1), run)
    words = ["evaluate", str(run), "--data", str(tiny_images), "--what", "bright", "--json", str(answer)]
    assert main(words) == 0
    found = json.loads(answer.read_text())
    assert 0 <= found["bright"] <= 1
    assert found["bright_protocol"] == "the share of <bright> images"
    assert {"splits", "left_out", "step", "report"} <= found.keys()
    value = found["bright"]
    assert ["brightness", "of", "images", f"{value:.3f}"] in [
        line.split()[:4] for line in capsys.readouterr().out.splitlines()
    ]
    sections = Text((run / "report" / "index.html").read_text()).sections
    (section,) = [text for text in sections if text.startswith(" brightness of images")]
    assert f"{value:.3f} {value / 2:.3f} – {(1 + value) / 2:.3f} 0.500" in section
    assert "the share of <bright> images" in section
    assert "Measured on " in section
    (kept,) = [text for text in sections if text.startswith(" All evaluations of this run")]
    assert f"brightness of images {value:.3f}" in kept
    assert main(["evaluate", str(run), "--data", str(tiny_images), "--what", "dark"]) == 2
    assert "give a list of mrr, knn, linear, attentive, equivariance, rollout, bright" in capsys.readouterr().err


def test_what_an_added_evaluation_needs_and_reads_is_heeded(made_up):
    config = tiny_config()
    model, space = tiny_model(config)
    test = TensorSplit(pictures(4))
    found = evaluate_model(model, config, space, test=test, what=["bright"], untrained=False)
    assert found == {"not_run": {"bright": "no training images were given"}}
    found = evaluate_model(model, config, space, test=test, train=test, what=["bright"], untrained=False)
    assert result_rows(found)[0][0] == "brightness of images"
    assert [one.measure for one in divide(found, step=1, weights="a", data="d")] == ["bright"]
    check_overrides(["eval.horizon=3"], command="evaluate", what=["bright"])
    with pytest.raises(UserError, match=r"eval\.horizon: it is for bright, which --what leaves out"):
        check_overrides(["eval.horizon=3"], command="evaluate", what=["knn"])
    assert registry.measure(["bright"], "triplets", None) == {"not_run": {"bright": "frames have no brightness"}}
