import numpy as np
import pytest
import torch

from iwm_fast.engine.metrics.collapse import rank_me, spread


def test_rank_me_equals_the_entropy_of_the_singular_values():
    x = np.random.default_rng(0).normal(size=(300, 24)) * np.geomspace(1, 1e-3, 24)
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    assert rank_me(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_a_collapsed_representation_has_rank_one_and_no_spread():
    x = torch.ones(100, 16)
    assert rank_me(x) == pytest.approx(1.0, abs=1e-4)
    assert spread(x) == 0.0


def test_nothing_at_all_is_not_an_error():
    assert rank_me(torch.zeros(10, 4)) >= 0.0
