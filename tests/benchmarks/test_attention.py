"""The attention benchmark: its exact answer, and that it times nobody whose answers are wrong."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from iwm_fast.benchmarks import attention
from iwm_fast.benchmarks.attention import CASES, CONTENDERS, Case, apart, exact, lengths_of, measure
from iwm_fast.errors import UserError

NEED_A_GPU = ("flash varlen", "xformers", "efficient, one gradient")
FEW = Case("vit_tiny_p4_32", "predictor", 4)


def test_the_exact_answer_is_pytorchs_of_each_image():
    q, k, v = torch.randn(3, 12, 2, 8, dtype=torch.float64)
    one = F.scaled_dot_product_attention(*(x[4:].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
    torch.testing.assert_close(exact(q, k, v, (4, 8))[4:], one)


def test_lengths_are_the_steps_own():
    context, target, joined = (lengths_of(Case("vit_tiny_p4_32", part, 8))[0] for part in attention.PARTS)
    assert target == [64] * 8
    assert all(c < j <= 64 + c for c, j in zip(context, joined, strict=True))
    assert lengths_of(CASES["cuda"][0])[1:] == (12, 64)


def test_who_is_wrong_is_not_timed(monkeypatch):
    """A contender without the softmax's scale beside ours."""

    def unscaled(segments):
        return lambda q, k, v: exact(q * q.shape[-1] ** 0.5, k, v, segments.lengths)

    wrong = {
        "iwm-fast": CONTENDERS["iwm-fast"],
        "padded, masked": CONTENDERS["padded, masked"],
        "unscaled": (apart(unscaled), None),
    }
    monkeypatch.setattr(attention, "CONTENDERS", wrong)
    said: list[str] = []
    rows = measure(FEW, torch.device("cpu"), torch.float32, 2, said.append)
    assert [(row["contender"], "skipped" in row) for row in rows] == [
        (name, name == "unscaled") for name in wrong for _ in (False, True)
    ]
    assert all(len(row["seconds"]) == 2 and row["error"] < 1e-6 for row in rows if "skipped" not in row)
    assert said[-1] == "vit_tiny_p4_32 predictor, 4 images unscaled, with gradients: skipped: its answers are wrong"


def test_a_gpu_is_asked_for_where_one_is_needed(monkeypatch):
    monkeypatch.setattr(attention, "CONTENDERS", {name: CONTENDERS[name] for name in NEED_A_GPU})
    rows = measure(FEW, torch.device("cpu"), torch.bfloat16, 1, lambda _: None)
    assert {row["skipped"] for row in rows} == {"needs a GPU"}


def test_cases_are_chosen_by_words_of_their_names(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "measure", lambda case, *_: [{"case": case.name}])
    file = tmp_path / "out.json"
    words = ["program", "--device", "cpu", "--json", str(file), "--only"]
    monkeypatch.setattr(attention.sys, "argv", [*words, "p4_32 context"])
    assert attention.main() == 0
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["vit_tiny_p4_32 context, 128 images"]
    monkeypatch.setattr(attention.sys, "argv", [*words, "p16"])
    with pytest.raises(UserError, match="--only: p16: no such case; there are vit_tiny_p8_96 context, 32 images; "):
        attention.main()
