from __future__ import annotations

import numpy as np
import pytest

from iwm_fast.eval.stats import bootstrap_interval, chance_hit, chance_mrr, evenly_spaced


def test_chance_is_what_random_rankings_give():
    """H_256 / 256 = 0.0239, the expectation of 1 / rank when every rank is equally likely."""
    assert chance_mrr(256) == pytest.approx(0.0239, abs=5e-5)
    ranks = np.random.default_rng(0).integers(1, 17, 200_000)
    assert chance_mrr(16) == pytest.approx((1 / ranks).mean(), rel=0.01)
    assert chance_hit(16, 5) == pytest.approx((ranks <= 5).mean(), rel=0.01)
    assert chance_hit(3, 5) == 1


def test_bootstrap_interval_has_the_width_of_the_standard_error_and_repeats():
    values = np.random.default_rng(1).normal(2.0, 3.0, 997)
    low, high = bootstrap_interval(values)
    error = values.std() / np.sqrt(len(values))
    assert low < values.mean() < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)  # 1,000 resamples: ends to about 3 %
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2))], ids=["empty", "two axes"])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="values has shape"):
        bootstrap_interval(values)


@pytest.mark.parametrize(("count", "total"), [(7, 100), (100, 100), (300, 101), (1, 5), (2, 3)])
def test_evenly_spaced_indices_are_distinct_and_cover_the_range(count, total):
    chosen = evenly_spaced(count, total)
    assert len(set(chosen.tolist())) == min(count, total)
    assert chosen.tolist() == sorted(chosen.tolist())
    half = total / min(count, total) / 2
    assert chosen[0] <= half
    assert total - 1 - half <= chosen[-1] < total
