"""`bench compare`: finds a planted slowdown, not noise alone, and refuses results that cannot be compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from iwm_fast.benchmarks.compare import compare
from iwm_fast.cli.main import main
from iwm_fast.errors import UserError
from iwm_fast.measure.stats import median_of, ratio_of
from iwm_fast.measure.timing import clocked


def noisy(seed, count=60, slowdown=1.0):
    """Times of a shared machine: correlated neighbours (autocorrelation 0.5), 4 % wide, one in twenty much later."""
    generator = np.random.default_rng(seed)
    drift = np.zeros(count)
    for i in range(1, count):
        drift[i] = 0.5 * drift[i - 1] + generator.normal(0, 0.035)
    late = (generator.random(count) < 0.05) * generator.exponential(0.5, count)
    return (0.1 * slowdown * np.exp(drift) * (1 + late)).tolist()


def document(seconds, kind="iwm-fast-bench-step/1", name="cpu-tiny"):
    return {"schema": kind, "environment": {}, "rows": [{"name": name, "seconds": seconds}]}


@pytest.mark.parametrize("seed", range(10))
def test_a_tenth_more_time_is_found(seed):
    found = compare(document(noisy(seed)), document(noisy(1000 + seed, slowdown=1.1)))
    assert [row["verdict"] for row in found["rows"]] == ["slower"]
    assert found["rows"][0]["low"] > 1


@pytest.mark.parametrize("seed", range(10))
def test_the_same_twice_passes(seed):
    found = compare(document(noisy(seed)), document(noisy(1000 + seed)))
    assert [row["verdict"] for row in found["rows"]] == ["same"]


def test_false_alarms_are_rare_over_many_pairs():
    """The 99 % interval alone would alarm in one of 200 equal pairs; the minimum change makes it fewer."""
    alarms = [
        compare(document(noisy(s)), document(noisy(5000 + s)))["rows"][0]["verdict"] == "slower" for s in range(100)
    ]
    assert sum(alarms) <= 1


def test_exit_codes_and_table(tmp_path, capsys):
    for name, slowdown in (("a", 1.0), ("b", 1.1), ("c", 1.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document(noisy(ord(name), slowdown=slowdown))))
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert main(["bench", "compare", a, c]) == 0
    assert main(["bench", "compare", a, b]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["bench", "compare", b, a]) == 0
    assert "faster" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="give two results of the same benchmark"):
        compare(document([1.0]), document([1.0], kind="iwm-fast-kernels/1"))
    with pytest.raises(UserError, match="no timed row in common"):
        compare(document([1.0]), document([1.0], name="other"))
    (tmp_path / "bad.json").write_text("[1]")
    assert main(["bench", "compare", str(tmp_path / "bad.json"), str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_kernels_are_told_apart_by_what_they_are(tmp_path):
    rows = [
        {"case": {"operation": "o", "tokens": n}, "contender": "eager", "passes": "forward", "seconds": [0.1 * n] * 5}
        for n in (1, 2)
    ]
    both = {"schema": "iwm-fast-kernels/1", "rows": [*rows, {"case": {}, "contender": "liger", "skipped": "none"}]}
    found = compare(both, both)
    assert [(row["name"], row["ratio"]) for row in found["rows"]] == [
        ("o 1 eager forward", 1),
        ("o 2 eager forward", 1),
    ]


def test_intervals_cover_the_truth_and_pairing_takes_common_noise_out():
    generator = np.random.default_rng(1)
    inside, widths = 0, []
    for _ in range(100):
        common = np.exp(generator.normal(0, 0.3, 40))
        above, below = 1.2 * common * np.exp(generator.normal(0, 0.01, 40)), common
        paired, alone = ratio_of(above, below, paired=True), ratio_of(above, below)
        inside += paired.low <= 1.2 <= paired.high
        widths.append((paired.high - paired.low) / (alone.high - alone.low))
    assert inside >= 90
    assert np.median(widths) < 0.5
    assert median_of([3.0, 1.0, 2.0]).value == 2.0
    with pytest.raises(ValueError, match="all finite"):
        median_of([1.0, float("nan")])


@pytest.mark.skipif("IWM_FAST_REAL_TIMING" not in os.environ, reason="set IWM_FAST_REAL_TIMING=1: takes a minute")
def test_on_this_machine():
    """Ten times: two series of the same work and one of 10 % more, taken in turn, are separated by CPU time."""
    x = torch.randn(96, 96)

    def work(products):
        return lambda: [x @ x for _ in range(products)]

    verdicts = []
    for _ in range(10):
        taken = {"a": [], "again": [], "slower": []}
        for _ in range(100):
            for name, products in (("a", 200), ("again", 200), ("slower", 220)):
                taken[name].append(clocked(work(products), torch.device("cpu")).cpu_seconds)
        verdicts.append(
            tuple(
                compare(document(taken["a"]), document(taken[name]))["rows"][0]["verdict"]
                for name in ("again", "slower")
            )
        )
    assert verdicts == [("same", "slower")] * 10


def test_help_comes_without_torch():
    code = "import sys; from iwm_fast.cli.main import main; main(['bench', 'compare', '--help']); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
