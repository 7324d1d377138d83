"""The attention benchmark: its float64 result, and that implementations with wrong results are not timed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from iwm_fast import kernels
from iwm_fast.benchmarks import attention
from iwm_fast.benchmarks.attention import CASES, Case, lengths_of, measure
from iwm_fast.benchmarks.baselines.attention import BACKEND_OF, CONTENDERS, apart, exact
from iwm_fast.benchmarks.parts import attention_table
from iwm_fast.benchmarks.parts.attention_table import table_of, whole_table, write_table
from iwm_fast.errors import UserError
from iwm_fast.kernels._tuning import tuner as _tuning
from iwm_fast.models import measured_attention
from iwm_fast.models.attention import BACKENDS

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


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    """An implementation without the softmax's scale, beside iwm-fast's."""

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
    assert said[-1] == "vit_tiny_p4_32 predictor, 4 images unscaled, forward + backward: skipped: wrong result"


def test_an_implementation_that_needs_a_gpu_says_so(monkeypatch):
    named = {name: CONTENDERS[name] for name in BACKEND_OF}
    monkeypatch.setattr(attention, "CONTENDERS", named)
    rows = measure(FEW, torch.device("cpu"), torch.bfloat16, 1, lambda _: None)
    assert {row["skipped"] for row in rows if row["backend"] != "sdpa"} == {"needs a GPU"}
    assert {row["skipped"] for row in rows if row["backend"] == "sdpa"} == {"iwm-fast's own choice on a CPU"}
    assert [row["backend"] for row in rows[::2]] == list(BACKEND_OF.values())
    assert sorted(BACKEND_OF.values()) == sorted(BACKENDS)


def test_cases_are_chosen_by_words_of_their_names(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "measure", lambda case, *_: [{"case": case.name}])
    file = tmp_path / "out.json"
    words = ["program", "--device", "cpu", "--json", str(file), "--only"]
    monkeypatch.setattr(attention.sys, "argv", [*words, "p4_32 context"])
    assert attention.main() == 0
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["vit_tiny_p4_32 context, 128 images"]
    monkeypatch.setattr(attention.sys, "argv", [*words, "p16"])
    with pytest.raises(UserError, match="--only p16: no such case; choose from vit_tiny_p8_96 context, 32 images; "):
        attention.main()


GPU = torch.device("cuda", 0)


def test_the_table_that_is_written_is_the_one_that_auto_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_table, "device_name", lambda _: "A_GPU")
    monkeypatch.setattr(measured_attention, "device_name", lambda _: "A_GPU")
    measured_attention._table.cache_clear()
    file = tmp_path / "tuned.json"
    shutil.copy(kernels.TUNED, file)
    segments = attention.Segments.from_lengths([80, 90, 100])
    wanted = {False: "varlen", True: "xformers"}
    rows = [
        {"backend": name, "key": measured_attention.attention_key(segments, 12, 64, torch.bfloat16, gradients=passes),
         "tokens": 270, "p50": seconds if name == wanted[passes] else 1.0}
        for passes, seconds in ((False, 0.9), (True, 0.99))
        for name in ("xformers", "varlen", "cudnn")
    ]  # fmt: skip
    rows += [{"contender": "nested tensors", "p50": 0.1}, {**rows[0], "backend": "sdpa", "skipped": "why"}]
    del rows[-1]["p50"]
    assert table_of(rows, torch.device("cpu")) == {}
    write_table(file, {"A_GPU": {"of other lengths": {"choice": "sdpa"}}})
    write_table(file, table_of(rows, GPU))
    before = json.loads(kernels.TUNED.read_text())
    after = json.loads(file.read_text())
    assert {**after, "attention": before.get("attention", {})} == {**before, "attention": before.get("attention", {})}
    assert len(after["attention"]["A_GPU"]) == 3
    monkeypatch.setattr(_tuning, "TUNED", file)
    for passes, name in wanted.items():
        given = segments, 12, 64, torch.bfloat16
        assert measured_attention.measured_choice(GPU, *given, gradients=passes) == name
    measured_attention._table.cache_clear()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": []}'], ids=["absent", "torn", "a list", "a result"])
def test_a_table_that_is_none_is_refused_before_anything_is_measured(tmp_path, monkeypatch, text):
    file = tmp_path / "tuned.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(attention.sys, "argv", ["attention", "--json", str(tmp_path / "a.json"), "--table", str(file)])
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"tuned\.json: .*kernels/tuned\.json to --table"):
        attention.main()


def test_a_table_is_as_it_was_where_it_is_read(tmp_path):
    file = tmp_path / "tuned.json"
    shutil.copy(kernels.TUNED, file)
    write_table(file, {})
    assert whole_table(file) == {**whole_table(kernels.TUNED), "attention": whole_table(file)["attention"]}
