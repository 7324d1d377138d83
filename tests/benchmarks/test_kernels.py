"""The kernels' benchmark: its counts, its comparisons, and that wrong results are never timed."""

import json
from dataclasses import asdict

import pytest
import torch

from iwm_fast.benchmarks import kernels
from iwm_fast.benchmarks.baselines.kernels import CONTENDERS, Contender
from iwm_fast.benchmarks.cases.kernel_cases import CASES, OPERATIONS, Case, at_most, inputs
from iwm_fast.benchmarks.kernels import kept_bytes
from iwm_fast.benchmarks.plots.kernels import draw, table
from iwm_fast.measure.timing import spread

MLP = Case("conditioned_mlp", tokens=64, width=24, hidden=40, actions=3, images=4)
LOSS = Case("stopgrad_l2", tokens=64, width=24, rows=90)
STREAM = Case("residual_norm", tokens=64, width=24)
BRANCH = Case("residual_norm", tokens=64, width=24, rows=64)
INPUT = Case("predictor_input", tokens=40, width=24, images=4, rows=24)
ROTATION = Case("rope", tokens=40, width=24, hidden=12)
DIFFERENTIATED = (MLP, LOSS, STREAM, BRANCH, INPUT, ROTATION)
AVERAGE = Case("ema_update", tokens=0, width=24, hidden=40, blocks=2)
SOME_PATCHES = Case("patchify", tokens=7, width=48, images=3, side=8)
ALL_PATCHES = Case("patchify", tokens=12, width=48, images=3, side=8)
IN_E4M3 = Case("e4m3_rows", tokens=40, width=24)


@pytest.fixture
def few(monkeypatch):
    """Implementations without torch.compile, which is slow; ceilings of a small machine."""
    chosen = {name: CONTENDERS[name] for name in ("iwm-fast triton", "eager", "liger")}
    monkeypatch.setattr(kernels, "CONTENDERS", chosen)
    monkeypatch.setattr(kernels, "ceilings", lambda _: {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e10})
    return chosen


def run(cases):
    return kernels.measure(cases, torch.device("cpu"), 3, lambda _: None)


def test_each_contender_has_its_rows_or_its_reason(few, tmp_path):
    document = run(DIFFERENTIATED)
    json.dumps(document)
    for case in DIFFERENTIATED:
        rows = [row for row in document["rows"] if row["case"] == asdict(case)]
        assert [(row["contender"], row.get("passes")) for row in rows] == [
            ("iwm-fast triton", None),
            ("eager", "forward"),
            ("eager", "forward+backward"),
            ("liger", None),
        ]
        assert rows[0]["skipped"] == "needs a GPU"
        for row in rows[1:3]:
            assert len(row["seconds"]) == 3
            assert row["p20"] <= row["p50"] <= row["p80"]
            assert 0 < max(row["errors"].values()) < 0.1
            assert row["share_of_matmul"] == pytest.approx(row["flops"] / row["p50"] / 1e12)
    picture = tmp_path / "roofline.png"
    draw(document, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = table(document)
    assert lines.count("| eager ") == 2 * len(DIFFERENTIATED)
    assert lines.count("not timed: needs a GPU") == lines.count("| liger – |") == len(DIFFERENTIATED)


@pytest.mark.parametrize("case", [AVERAGE, SOME_PATCHES, ALL_PATCHES, IN_E4M3], ids=lambda case: case.name)
def test_what_has_no_gradient_is_timed_forward_alone(few, case):
    rows = run([case])["rows"]
    assert [row.get("passes", row.get("skipped")) for row in rows] == [
        "needs a GPU", "forward", "does not offer the operation"
    ]  # fmt: skip
    assert rows[1]["kept_bytes"] == 0
    answers = {"ema_update": {"averages", "weights", "copies"}, "patchify": {"out"}, "e4m3_rows": {"out", "out 1"}}
    assert rows[1]["errors"].keys() == answers[case.operation]
    # fp32 throughout, except for the bf16 output: half of its step is 2⁻⁹. A bf16 rounding of GELU may change one to
    # e4m3, whose steps are up to 2⁻³, or a scale.
    assert 0 < max(rows[1]["errors"].values()) < (0.1 if case is IN_E4M3 else 2**-8)


WRONG = {
    "an average that stays": (AVERAGE, None),
    "nothing": (ALL_PATCHES, torch.zeros(12, 48)),
    "not a number": (ALL_PATCHES, torch.full((12, 48), torch.nan)),
}


@pytest.mark.parametrize(("case", "answer"), WRONG.values(), ids=WRONG.keys())
def test_wrong_results_of_what_has_no_gradient_are_not_timed(few, case, answer):
    few["wrong"] = Contender("1", lambda _: lambda **_: answer)
    rows = [row for row in run([case])["rows"] if row["contender"] == "wrong"]
    assert [row["skipped"] for row in rows] == ["wrong result"]


def test_fewer_of_all_patches_are_all_patches_of_fewer_images():
    fewer = at_most(ALL_PATCHES, 3, 2, 9, 9)
    assert (fewer.tokens, fewer.images) == (8, 2)
    assert "patches" not in inputs(fewer, torch.device("cpu"), torch.bfloat16)
    given = inputs(SOME_PATCHES, torch.device("cpu"), torch.bfloat16)
    rows = set(zip(given["image_of_token"].tolist(), given["patches"].tolist(), strict=True))
    assert len(rows) == 7
    assert rows <= {(image, patch) for image in range(3) for patch in range(4)}


def test_every_operation_has_cases():
    assert {case.operation for case in CASES} == set(OPERATIONS)


def test_wrong_results_are_not_timed(few):
    few["fast and wrong"] = Contender("1", lambda _: lambda pred, **_: pred.float().square().mean())
    rows = [row for row in run([LOSS])["rows"] if row["contender"] == "fast and wrong"]
    assert [row["skipped"] for row in rows] == ["wrong result"]
    assert "seconds" not in rows[0]


def test_counts_by_hand():
    assert LOSS.counts(backward=True) == {"flops": 64 * 24 * 9, "bytes": 64 * (3 * 24 * 2 + 8)}
    elements = 2 * (24 * 72 + 72 + 24 * 24 + 24 + 2 * 24 * 40 + 40 + 24 + 4 * 24)
    assert AVERAGE.counts(backward=False) == {"flops": 3 * elements, "bytes": 14 * elements}
    assert SOME_PATCHES.counts(backward=False) == {"flops": 2 * 7 * 48, "bytes": 7 * (48 * 3 + 16)}
    assert ALL_PATCHES.counts(backward=False)["bytes"] == 12 * 48 * 3
    forward = 2 * 64 * 40 * (24 + 24) + 2 * 4 * 40 * 3
    backward = 2 * 2 * 64 * 40 * (24 + 24) + 2 * 4 * 40 * 3
    assert IN_E4M3.counts(backward=False) == {"flops": 2 * 40 * 24, "bytes": 40 * 24 * 3 + 40 * 4}
    assert STREAM.counts(backward=False) == {"flops": 64 * 24 * 7, "bytes": 2 * (2 * 64 * 24 + 2 * 24)}
    both = {"flops": 64 * 24 * (8 + 12), "bytes": 2 * (8 * 64 * 24 + 5 * 24)}
    assert BRANCH.counts(backward=True) == both
    assert INPUT.counts(backward=False) == {"flops": 64 * 24, "bytes": 2 * (80 + 24) * 24 + 8 * 128}
    assert MLP.counts(backward=False)["flops"] == forward
    assert MLP.counts(backward=True)["flops"] == forward + backward


def test_saved_bytes_are_those_of_the_graph_alone():
    x = torch.randn(10, 8, requires_grad=True)
    assert kept_bytes(lambda x: x.exp(), {"x": x}) == 10 * 8 * 4  # its output
    assert kept_bytes(lambda x: x * x, {"x": x}) == 0  # the input itself


def test_spread():
    assert spread([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert spread([4.0]) == {"p20": 4.0, "p50": 4.0, "p80": 4.0}
