"""The suite for a GPU that is lent for minutes: what one part does wrong costs the others nothing, and time is held."""

from __future__ import annotations

import json

from iwm_fast.benchmarks import gpu_suite


def test_a_part_that_fails_leaves_its_error_and_the_others_their_results(tmp_path, capfd):
    words = ["--device", "cpu", "--out", str(tmp_path), "--parts", "step", "ceilings", "--limit", "0.01"]
    assert gpu_suite.main(words) == 1
    failed, done = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("step", "ceilings"))
    assert "timed out" in failed["error"]
    assert done["matmul_flops_per_s"] > 0
    assert {failed["schema"], done["schema"]} == {"iwm-fast-gpu-suite/1"}
    assert [line.split(" in ")[0] for line in capfd.readouterr().out.splitlines()] == ["step: failed", "ceilings: done"]


def test_nothing_begins_after_its_time(tmp_path, capfd):
    words = ["--device", "cpu", "--out", str(tmp_path), "--parts", "ceilings", "kernels", "--budget", "0.01"]
    assert gpu_suite.main(words) == 1
    assert "no time was left" in json.loads((tmp_path / "ceilings.json").read_text())["error"]
    assert not (tmp_path / "kernels.json").exists()
    assert "kernels: not begun" in capfd.readouterr().out


def test_the_most_valuable_part_comes_first():
    assert list(gpu_suite.PARTS)[:5] == ["doctor", "ceilings", "kernels", "step", "peers"]
