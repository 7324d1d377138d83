from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import nn
from worlds import pictures, tiny_config, tiny_model

from iwm_fast.actions import ActionSpace
from iwm_fast.config import ActionsConfig
from iwm_fast.eval.equivariance import RIDGES, draw_pairs, measure_equivariance, ridge_regression
from iwm_fast.eval.evaluate import evaluate_model
from iwm_fast.eval.splits import TensorSplit
from iwm_fast.eval.stats import bootstrap_interval, bootstrap_rows

ACTIONS = ActionsConfig()


class Seen(nn.Module):
    """Stands for an encoder of one token: what it says of an image is `of`(images) (B, D)."""

    def __init__(self, of):
        super().__init__()
        self.of = of
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.of(images.float())


class Model(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.target_encoder = Seen(of)


def measure(of, **changes):
    options = {"actions": ACTIONS, "train": pictures(300), "test": pictures(200, seed=1), "which": "target"}
    return measure_equivariance([Model(of)], **(options | changes))[0]


def content(images):
    """What jitter leaves alone: here, a random code that belongs to the picture's order of levels."""
    grey = images.mean(dim=3).flatten(1)
    return (grey > grey.median(dim=1, keepdim=True).values).float() - 0.5


def test_an_encoder_that_keeps_the_colours_is_equivariant_and_one_of_content_alone_is_invariant():
    """Mean colour and contrast of a picture of even noise tell its jitter: the pictures' own means hardly vary."""
    colours = measure(lambda x: torch.cat([x.mean(dim=(1, 2)), x.std(dim=(1, 2)), x.square().mean(dim=(1, 2))], dim=1))
    constant = measure(lambda x: torch.ones(len(x), 3))
    order = measure(content)
    assert colours.r2["brightness"] > 0.8
    assert colours.equivariance > 0.5
    assert max(order.r2.values()) < 0.2
    assert order.invariance > 0.5
    assert colours.equivariance > 2 * order.equivariance
    assert constant.equivariance == 0
    assert constant.cosine_same == pytest.approx(1)
    for found in (colours, order):
        for name, (low, high) in found.r2_interval.items():
            assert low <= found.r2[name] <= high
        assert found.equivariance_interval[0] <= found.equivariance <= found.equivariance_interval[1]
        assert found.invariance_interval[0] <= found.invariance <= found.invariance_interval[1]


def test_noise_is_neither():
    found = measure(lambda x: torch.randn(len(x), 8, generator=torch.Generator().manual_seed(int(x.sum()) % 2**31)))
    assert found.equivariance < 0.05
    assert abs(found.invariance) < 0.3


def test_the_scale_of_the_cosine_takes_out_what_all_images_share():
    """A large constant brings every cosine near 1 and moves the place between same and other hardly at all."""
    plain = measure(content)
    shifted = measure(lambda x: torch.cat([content(x), torch.full((len(x), 1), 50.0)], dim=1))
    assert shifted.cosine_other > 0.99 > plain.cosine_other
    assert shifted.invariance == pytest.approx(plain.invariance, abs=0.05)


def test_pairs_are_what_the_action_says_and_depend_on_seed_and_row_only():
    images = pictures(6, side=12)
    pairs = draw_pairs(images, ACTIONS)
    assert pairs.names == ("brightness", "contrast", "saturation", "hue")
    part = draw_pairs(images[2:4], ACTIONS, first_sample=2)
    assert torch.equal(part.second, pairs.second[2:4])
    assert np.array_equal(part.action, pairs.action[2:4])
    assert not np.array_equal(draw_pairs(images, ACTIONS, seed=1).action, pairs.action)
    only = draw_pairs(images, ActionsConfig(contrast=0.0, saturation=0.0, hue=0.0))
    assert only.names == ("brightness",)
    factor = only.second.float().mean(dim=(1, 2, 3)) - only.first.float().mean(dim=(1, 2, 3))
    assert np.array_equal(np.sign(factor.numpy()), np.sign(only.action[:, 0]))
    # The component is a difference of factors over 0.8, whatever form the predictor is told.
    ratio = factor / images.float().mean(dim=(1, 2, 3)) / ActionSpace().components[0].range
    np.testing.assert_allclose(ratio.numpy(), only.action[:, 0], atol=0.05)


@pytest.mark.parametrize("features", [3, 40])
def test_ridge_regression_agrees_with_scikit_learn(features):
    random = np.random.default_rng(0)
    x = random.normal(size=(97, features)) @ random.normal(size=(features, features)) + 3
    y = x @ random.normal(size=(features, 2)) + random.normal(size=(97, 2))
    x_test = random.normal(size=(31, features))
    order = np.random.default_rng(0).permutation(97)
    kept, held = order[:78], order[78:]

    def theirs(rows, ridge, wanted, column):
        scale = x[rows].std(axis=0)
        model = Ridge(alpha=ridge * len(rows), solver="cholesky").fit(x[rows] / scale, y[rows, column])
        return model.predict(wanted / scale)

    want = []
    for column in range(2):
        errors = [((theirs(kept, ridge, x[held], column) - y[held, column]) ** 2).mean() for ridge in RIDGES]
        want.append(theirs(np.arange(97), RIDGES[int(np.argmin(errors))], x_test, column))
    np.testing.assert_allclose(ridge_regression(x, y, x_test), np.stack(want, axis=1), rtol=1e-6, atol=1e-6)


def test_channels_that_never_move_and_fewer_rows_than_features_do_no_harm():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 30)), random.normal(size=(20, 1))
    x[:, 5] = 7.0
    assert np.isfinite(ridge_regression(x, y, random.normal(size=(4, 30)))).all()


def test_r2_is_that_of_scikit_learn():
    config = tiny_config()
    model, _ = tiny_model(config)
    train, test = pictures(60), pictures(30, seed=1)
    (found,) = measure_equivariance([model], ACTIONS, train, test, which="context")
    rows = []
    for images, first in ((train, 0), (test, 2**32)):
        pairs = draw_pairs(images, ACTIONS, first_sample=first)
        with torch.no_grad():
            z = [model.encode(v, "context").mean(1).double().numpy() for v in (pairs.first, pairs.second)]
        rows.append((np.hstack(z), pairs.action))
    predicted = ridge_regression(*rows[0], rows[1][0])
    want = r2_score(rows[1][1], predicted, multioutput="raw_values")
    np.testing.assert_allclose(list(found.r2.values()), want, rtol=1e-6)
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*np.hsplit(rows[1][0], 2), strict=True)]
    assert found.cosine_same == pytest.approx(np.mean(cosine))


def test_the_bootstrap_of_a_mean_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    ends = bootstrap_rows(values[:, None], lambda means: means)
    assert np.ravel(ends) == pytest.approx(bootstrap_interval(values), abs=0.02)
    with pytest.raises(ValueError, match="table has shape"):
        bootstrap_rows(np.zeros((0, 2)), lambda means: means)


def test_evaluate_measures_it_beside_the_untrained_network_or_says_why_not():
    config = tiny_config()
    model, space = tiny_model(config)
    train, test = TensorSplit(pictures(40)), TensorSplit(pictures(20, seed=1))
    found = evaluate_model(model, config, space, train=train, test=test, what=("equivariance",))
    assert found["equivariance_pairs"] == [40, 20]
    for name in ("equivariance", "invariance", "cosine_same", "cosine_other", "r2_hue"):
        assert isinstance(found[name], float)
        assert isinstance(found[f"{name}_untrained"], float)
    assert "not_run" not in found
    for options, reason in (
        ({"train": None}, "no training images"),
        ({"train": TensorSplit(pictures(3))}, "3 training and 20 test images are too few"),
    ):
        found = evaluate_model(model, config, space, test=test, what=("equivariance",), **options)
        assert reason in found["not_run"]["equivariance"]
    with pytest.raises(ValueError, match="train has 4 images"):
        measure_equivariance([model], ACTIONS, pictures(4), pictures(4), which="target")
