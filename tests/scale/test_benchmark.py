"""The benchmark of scale: its rows, exponents and picture."""

import json

import pytest

from iwm_fast.benchmarks.scale import _exponents, main


@pytest.mark.slow
def test_rows_exponents_and_a_picture_are_written(tmp_path):
    words = ["--ranks", "16", "32", "--images", "1e4", "1e5", "--processes", "2", "3", "--json"]
    assert main([*words, str(tmp_path / "scale.json")]) == 0
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [row["ranks"] for row in found["ranks"]] == [16, 32]
    assert found["exponents"]["ranks"]["meeting_most_calls_of_a_rank"] == pytest.approx(0, abs=1e-6)
    assert found["exponents"]["ranks"]["meeting_keys_read"] == pytest.approx(1, abs=0.1)
    assert all(row["look_words"].startswith("host node") for row in found["ranks"])
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_exponents_are_those_of_powers_and_words_have_none():
    rows = [{"size": n, "square": 3.0 * n**2, "constant": 7, "words": "x", "none": 0} for n in (4, 16, 256)]
    assert _exponents(rows, set(rows[0])) == pytest.approx({"square": 2.0, "constant": 0.0}, abs=1e-9)
