"""The baselines of the step: all compute the same from the same masks, and the counts are right."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from iwm_fast.benchmarks import peers
from iwm_fast.benchmarks.adapters import answers, ours, plain
from iwm_fast.benchmarks.adapters.ijepa import Checkout, Ijepa
from iwm_fast.benchmarks.adapters.inputs import Inputs, Shape, draw_inputs, draw_masks, fingerprint
from iwm_fast.benchmarks.adapters.peer_rows import Peer, batches, counted_row
from iwm_fast.benchmarks.adapters.peer_rows import peers as all_peers
from iwm_fast.benchmarks.parts import report_sections
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


def test_a_network_that_differs_is_detected(monkeypatch):
    """Another LayerNorm epsilon in one network already exceeds the tolerance: the check can fail."""
    monkeypatch.setattr("iwm_fast.benchmarks.baselines.plain_step._EPS", 0.1)
    assert answers.plain_difference(SHAPE, inputs()) > answers.TOLERANCE


def test_fingerprints_tell_patches_and_nothing_else():
    a, b = [np.array([1, 2, 5])], [np.array([3, 4])]
    assert fingerprint(a, b) == fingerprint([np.array([5, 1, 2])], [np.array([4, 3, 3, 4])])
    assert fingerprint(a, b) != fingerprint([np.array([1, 2])], [np.array([5, 3, 4])])
    assert fingerprint(a, b) != fingerprint(b, a)


def test_both_steps_report_the_masks_that_they_were_given():
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
    """Every image is computed at the longest's length: padding is work too."""
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


def comparison(until=math.inf, here=False):
    args = argparse.Namespace(
        device="cpu", threads=1, ijepa=None, rounds=3, limit=1.0, until=until, here=here
    )  # fmt: skip
    ranks = argparse.Namespace(device=torch.device("cpu"))
    return peers.Comparison(args, None, ranks, time.monotonic() + until)


def peer(compiled=False, difference=0.0):
    own = all_peers(None)["plain"]
    return Peer(own.ours, own.make, own.operations, lambda *_: difference, compiled)


def test_our_own_step_with_static_shapes_is_a_baseline_with_the_same_loss_and_more_flops():
    inputs = batches(SHAPE, None, 1, 0)
    static = all_peers(None)["static shapes"]
    assert static.difference(SHAPE, inputs[0]) < 1e-6
    assert 0.5 < counted_row(SHAPE, "static shapes", static, None)["operations_ratio"] < 1
    side = static.make(SHAPE, inputs, torch.device("cpu"))
    assert side.trainer.config.train.static_shapes
    assert np.isfinite(side.step())


def test_eager_baselines_come_first_and_the_compiled_ones_each_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setattr(peers.Comparison, "row", lambda _, shape, name, __: {"here": (shape.name, name)})
    monkeypatch.setattr(peers.Comparison, "apart", lambda _, shape, name: {"apart": (shape.name, name)})
    other = Shape("vit_micro", 96, 8, 2, 64, 3)
    chosen = {"a compile": peer(compiled=True), "a": peer(), "b": peer()}
    found = list(peers.compare([SHAPE, other], [SHAPE, other], chosen, comparison()))
    names = [(shape.name, name) for shape in (SHAPE, other) for name in chosen]
    assert found == [{"here": n} for n in names if n[1] != "a compile"] + [
        {"apart": n} for n in names if n[1] == "a compile"
    ]
    assert all("here" in row for row in peers.compare([SHAPE], [SHAPE], chosen, comparison(here=True)))


def test_what_there_is_no_time_for_is_a_row_that_says_so():
    chosen = {"a compile": peer(compiled=True), "a": peer()}
    found = list(peers.compare([SHAPE], [SHAPE], chosen, comparison(until=0)))
    assert [row["peer"] for row in found] == ["a", "a compile"]
    assert {row["skipped"] for row in found} == {"not started: 0 s were left of --until 0"}


def test_no_row_begins_in_less_time_than_another_took(monkeypatch):
    """A larger shape takes longer than a smaller one: it would be cut off, with everything after it."""
    now = [100.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])

    def row(*_):
        now[0] += 40
        return {"seconds": 40}

    monkeypatch.setattr(peers.Comparison, "row", row)
    monkeypatch.setattr(peers.Comparison, "apart", lambda *_: {"apart": True})
    chosen = {"a": peer(), "b": peer(), "c compile": peer(compiled=True)}
    first, second, third = peers.compare([SHAPE], [SHAPE], chosen, comparison(until=70))
    assert first == {"seconds": 40}
    assert second["skipped"] == "not started: 30 s were left of --until 70, and another took 40 s"
    assert third == {"apart": True}


def test_a_baseline_whose_results_differ_has_a_row_and_is_not_timed():
    row = comparison().row(SHAPE, "a", peer(difference=float("nan")))
    assert row["skipped"] == "wrong result: nan from iwm-fast's"
    assert row["operations_ratio"] > 0
    assert "seconds" not in row


def _failing(*_, **__):
    said = "compiling\ntorch._inductor.exc.InductorError: AssertionError: \n\nSet TORCHDYNAMO_VERBOSE=1"
    return subprocess.CompletedProcess([], 1, "", said)


def _too_long(*_, timeout, **__):
    assert 0 < timeout <= 60
    raise subprocess.TimeoutExpired([], timeout)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (_failing, "exit code 1: torch._inductor.exc.InductorError: AssertionError: "),
        (_too_long, "not finished after 0 s; raise --until (60)"),
    ],
)
def test_a_compiled_baseline_that_fails_or_takes_too_long_loses_its_own_row_only(monkeypatch, run, said):
    monkeypatch.setattr(subprocess, "run", run)
    row = comparison(until=60).apart(SHAPE, "plain compile")
    assert row["skipped"] == said
    document = {"rows": [row], "threads": 1, "device": "cpu", "missing": {"timm": "not installed"}}
    lines = report_sections.SECTIONS["iwm-fast-peers/1"][1](document)
    assert lines[-2:] == ["- timm was not timed: not installed", f"- {row['name']} was not timed: {said}"]


def test_a_process_of_its_own_gives_its_row_back(monkeypatch):
    """The same program with one baseline and one shape, told to measure in its own process and until when."""

    def run(command, **_):
        assert command[:3] == [sys.executable, "-m", "iwm_fast.benchmarks.peers"]
        args = peers._parser().parse_args(command[3:])
        assert (args.shape, args.peers, args.here) == ([SHAPE.name], ["plain compile"], True)
        assert args.until <= 58
        Path(args.json).write_text(json.dumps({"rows": [{"speed_ratio": 2.0}]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert comparison(until=60).apart(SHAPE, "plain compile") == {"speed_ratio": 2.0}


def test_each_row_is_written_before_the_next_is_measured(monkeypatch, tmp_path):
    row = {"name": "a", "peer": "a", "shape": "b", "speed_ratio": None, "memory_ratio": None, "skipped": "no"}

    def compare(*_):
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "compare", compare)
    file = tmp_path / "peers.json"
    with pytest.raises(KeyboardInterrupt):
        peers.main(["--device", "cpu", "--threads", "1", "--json", str(file), "--peers", "plain"])
    assert json.loads(file.read_text())["rows"] == [row]


@pytest.mark.parametrize("error", [UserError("loss not finite"), torch.OutOfMemoryError("no memory\nof 3")])
def test_a_baseline_that_fails_loses_its_own_row_only(monkeypatch, tmp_path, error):
    done = {"name": "a", "peer": "plain", "shape": "b", "speed_ratio": None}

    def row(_, shape, *__):
        if shape is peers.TIMED[0]:
            raise error
        return done

    monkeypatch.setattr(peers.Comparison, "row", row)
    file = tmp_path / "peers.json"
    words = ["--device", "cpu", "--threads", "1", "--json", str(file), "--peers", "plain", "--shape"]
    assert peers.main([*words, *(shape.name for shape in peers.TIMED)]) == 1
    failed, other = json.loads(file.read_text())["rows"]
    assert failed["skipped"] == f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    assert other == done
