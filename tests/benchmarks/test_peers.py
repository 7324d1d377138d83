"""The peers: that all sides compute the same from the same masks, and that what is counted is right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from iwm_fast.benchmarks import peers
from iwm_fast.benchmarks.adapters import answers, ours, plain
from iwm_fast.benchmarks.adapters.ijepa import Checkout, Ijepa
from iwm_fast.benchmarks.adapters.inputs import Inputs, Shape, draw_inputs, draw_masks, fingerprint
from iwm_fast.config.schema import ENCODERS, EncoderShape
from iwm_fast.errors import UserError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SHAPE = Shape("vit_micro", 48, 8, 2, 64, 3)
CHECKOUT = os.environ.get("IWM_FAST_IJEPA")
needs_ijepa = pytest.mark.skipif(not CHECKOUT, reason="set IWM_FAST_IJEPA to a clone of facebookresearch/ijepa")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(ENCODERS, "vit_micro", EncoderShape(depth=2, width=64, heads=4))


def inputs(seed=0):
    return draw_inputs(SHAPE, draw_masks(SHAPE, np.random.default_rng(seed)), 7, seed)


def on_meta(one):
    return Inputs(one.source.to("meta"), one.target.to("meta"), one.action.to("meta"), one.masks)


def test_masks_are_cut_to_the_shortest_and_disjoint_from_the_blocks():
    masks = draw_masks(SHAPE, np.random.default_rng(3))
    assert masks.context.shape == (3, masks.drawn.min())
    for context, union in zip(masks.context, masks.unions(), strict=True):
        assert not set(context) & set(union)
        assert list(union) == sorted(set(union))


def test_the_plain_step_computes_what_iwm_fast_does():
    assert answers.plain_difference(SHAPE, inputs()) < 1e-5


def test_a_network_that_is_not_ours_is_told_apart(monkeypatch):
    """Another epsilon of one side's normalisation is already above the tolerance: the check can fail."""
    monkeypatch.setattr("iwm_fast.benchmarks.plain_step._EPS", 0.1)
    assert answers.plain_difference(SHAPE, inputs()) > answers.TOLERANCE


def test_fingerprints_tell_patches_and_nothing_else():
    a, b = [np.array([1, 2, 5])], [np.array([3, 4])]
    assert fingerprint(a, b) == fingerprint([np.array([5, 1, 2])], [np.array([4, 3, 3, 4])])
    assert fingerprint(a, b) != fingerprint([np.array([1, 2])], [np.array([5, 3, 4])])
    assert fingerprint(a, b) != fingerprint(b, a)


def test_both_sides_report_the_masks_that_they_were_given():
    one = inputs()
    expected = fingerprint(list(one.masks.context), one.masks.unions())
    assert plain.Plain(SHAPE, [one], torch.device("cpu")).saw() == [expected]
    seen = object.__new__(ours.Ours)
    seen._batches = [ours._batch(one, torch.device("cpu"))]
    assert seen.saw() == [expected]
    other = inputs(1)
    assert plain.Plain(SHAPE, [other], torch.device("cpu")).saw() != [expected]


def products(tokens, width, dense):
    """Multiply-adds of one block's forward pass, by hand: qkv and proj, two MLP layers, scores and weighted values."""
    return 3 * width**2 * tokens + width**2 * tokens + 8 * width**2 * tokens + 2 * width * sum(n * n for n in dense)


def test_the_plain_steps_operations_by_hand():
    """Each image is computed at the longest's length: padding is work too."""
    one = inputs()
    context, asked = one.masks.context.shape[1], max(len(u) for u in one.masks.unions())
    images, width, patches = SHAPE.batch, 64, 36
    target = patches * images * width * 192 + 2 * products(patches * images, width, [patches] * images)
    first = patches * images * width * 192
    inner = 2 * products(context * images, width, [context] * images)
    joined = context + asked
    predictor = images * (context * width * 64 + asked * 64 * width)
    predictor += 2 * products(joined * images, 64, [joined] * images)
    # Three layers of the mask tokens; the gradient of the first one's input goes to the position's and token's sum.
    predictor += images * asked * (71 * 64 + 2 * 64 * 64)
    assert plain.operations(SHAPE, [on_meta(one)]) == [2 * (target + first * 2 + 3 * (inner + predictor))]


def test_our_operations_are_the_formulas():
    found = ours.operations(SHAPE, [on_meta(inputs()), on_meta(inputs(1))], "feature")
    assert all(counted == formula for counted, formula in found)


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="not a checkout of facebookresearch/ijepa"):
        Checkout(tmp_path)
    assert peers.main(["--ijepa", str(tmp_path), "--device", "cpu", "--json", "-"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@needs_ijepa
def test_ijepa_computes_what_iwm_fast_does_and_sees_the_same():
    checkout = Checkout(Path(CHECKOUT))
    shape = Shape("vit_tiny", 96, 8, 2, 192, 2)
    masks = checkout.draw_masks(shape, 1, 0)[0]
    one = draw_inputs(shape, masks, 7, 0)
    assert answers.ijepa_difference(checkout, shape, one) < 1e-5
    side = Ijepa(checkout, shape, [one], torch.device("cpu"))
    assert side.saw() == [fingerprint(list(masks.context), masks.unions())]
    assert (masks.drawn >= masks.context.shape[1]).all()
    assert np.isfinite(side.step())


@pytest.mark.parametrize(
    ("name", "peers_in_it"),
    [
        ("peers_cpu", {"ijepa", "plain"}),
        ("peers_compiled_cpu", {"ijepa", "ijepa compile", "timm", "plain", "plain compile"}),
    ],
)
def test_the_committed_result_has_equal_masks_and_raw_times(name, peers_in_it):
    document = json.loads((RESULTS / f"{name}.json").read_text())
    assert document["schema"] == "iwm-fast-peers/1"
    assert peers_in_it <= {row["peer"] for row in document["rows"]}
    for row in document["rows"]:
        assert row["operations_per_image"]["ours"] == row["operations_per_image"]["ours_formula"]
        if row["speed_ratio"] is not None:
            assert row["masks"]["ours"] == row["masks"]["peer"]
            middle = {side: np.median(times) for side, times in row["seconds"].items()}
            assert row["speed_ratio"] == pytest.approx(middle["peer"] / middle["ours"])
            assert row["difference"] < answers.TOLERANCE
