"""Ridge regression beside scikit-learn's, with fewer and with more features than rows."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from iwm_fast.eval.ridge import RIDGES, fit_ridge


def theirs(x, y, rows, ridge, wanted):
    """scikit-learn's predictions for features of unit variance, in the rows that are fitted."""
    scale = x[rows].std(axis=0)
    model = Ridge(alpha=ridge * len(rows), solver="cholesky").fit(x[rows] / scale, y[rows])
    return model.predict(wanted / scale)


@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize("features", [3, 40, 300])
def test_predictions_and_held_out_r2_are_those_of_scikit_learn(features, by_mask):
    random = np.random.default_rng(0)
    x = random.normal(size=(97, features)) @ random.normal(size=(features, features)) + 3
    y = x @ random.normal(size=(features, 2)) + random.normal(size=(97, 2))
    x_test = random.normal(size=(31, features))
    order = np.random.default_rng(0).permutation(97)
    kept, held = order[:78], order[78:]
    mask = None
    if by_mask:
        mask = np.arange(97) % 7 == 0
        kept, held = np.flatnonzero(~mask), np.flatnonzero(mask)
    fit = fit_ridge(x, y, mask)
    for column in range(2):
        wanted = y[:, column]
        tried = [theirs(x, wanted, kept, ridge, x[held]) for ridge in RIDGES]
        best = int(np.argmin([((one - wanted[held]) ** 2).mean() for one in tried]))
        assert fit.r2[column] == pytest.approx(r2_score(wanted[held], tried[best]), rel=1e-5, abs=1e-6)
        want = theirs(x, wanted, np.arange(97), RIDGES[best], x_test)
        np.testing.assert_allclose(fit.predict(x_test)[:, column], want, rtol=1e-5, atol=1e-5)


def test_channels_and_targets_that_never_move_do_no_harm():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 30)), random.normal(size=(20, 2))
    x[:, 5], y[:, 1] = 7.0, 3.0
    fit = fit_ridge(x, y)
    told = fit.predict(random.normal(size=(4, 30)))
    assert np.isfinite(told).all()
    np.testing.assert_allclose(told[:, 1], 3.0)
    assert fit.r2[1] == 0.0
