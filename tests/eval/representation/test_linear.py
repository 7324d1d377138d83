from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from iwm_fast.eval.held_out import held_out_rows
from iwm_fast.eval.representation import linear
from iwm_fast.eval.representation.linear import linear_probe


def drawn(seed: int, train: int = 601, test: int = 307, width: int = 13, classes: int = 7, noise: float = 1.0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, width))
    labels = [generator.integers(0, classes, n) for n in (train, test)]
    rows = [torch.from_numpy(centres[y] + noise * generator.normal(size=(len(y), width))).float() for y in labels]
    return rows[0], labels[0], rows[1], labels[1]


@pytest.mark.parametrize("spread", [0.0, -3.0], ids=["even", "nearly flat"])
@pytest.mark.parametrize("decay", [1e-1, 1e-4])
def test_fit_reaches_the_minimum_of_the_convex_loss(spread, decay, monkeypatch):
    """Against the same loss minimised in float64 by autograd, on plain features, to a slope of 1e-9."""
    monkeypatch.setattr(linear, "_ROWS", 200)  # four blocks, the last one short
    x, y, _, _ = drawn(4)
    x = x * torch.logspace(0, spread, x.shape[1])
    labels = torch.from_numpy(y)

    def loss(weight):
        logits = x.double() @ weight[:-1] + weight[-1]
        return F.cross_entropy(logits, labels) + decay / 2 * weight[:-1].square().sum()

    best = torch.zeros(14, 7, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([best], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = loss(best)
        value.backward()
        return value

    solver.step(closure)
    with torch.no_grad():
        probe = linear._Probe(x, labels, 7, x.double().square().mean(dim=0).float())
        probe.fit(decay)
        # It stops when an iteration gains less than 1e-7; later ones would gain less still.
        assert float(loss(probe.weight.double()) - loss(best)) < 2e-5
        assert float(loss(best)) < 0.9 * np.log(7)


def test_separable_classes_are_separated_whatever_the_scale_of_the_features():
    x, y, x_test, y_test = drawn(1, noise=0.02)
    for scale, offset in ((1.0, 0.0), (1e-4, 0.0), (1.0, 30.0)):
        found = linear_probe(x * scale + offset, y, x_test * scale + offset, y_test)
        assert found.top1 == 1
        assert found.top5 == 1


def test_channels_that_never_move_change_nothing():
    x, y, x_test, y_test = drawn(2)
    plain = linear_probe(x, y, x_test, y_test)
    more = linear_probe(F.pad(x, (0, 3), value=0.3), y, F.pad(x_test, (0, 3), value=0.3), y_test)
    assert more.top1 == pytest.approx(plain.top1, abs=2 / 307)
    assert plain.top1_interval[0] < plain.top1 < plain.top1_interval[1]


def test_the_weight_decay_is_chosen_without_the_test_images():
    x, y, x_test, y_test = drawn(3, train=150, width=60, noise=3.0)
    found = linear_probe(x, y, x_test, y_test)
    other = linear_probe(x, y, torch.randn_like(x_test), (y_test + 1) % 7)
    assert (other.weight_decay, other.held_out_top1) == (found.weight_decay, found.held_out_top1)
    assert found.weight_decay > min(linear.WEIGHT_DECAYS)  # noise needs decay


def test_top5_is_left_out_where_it_says_nothing():
    x, y, x_test, y_test = drawn(5, classes=5)
    found = linear_probe(x, y, x_test, y_test)
    assert found.top5 is None
    assert found.top5_interval is None


def test_held_out_rows_are_a_tenth_of_each_class_and_the_same_each_time():
    labels = np.repeat([0, 1, 2, 3], [100, 37, 2, 1])
    held = held_out_rows(labels)
    assert [int(held[labels == c].sum()) for c in range(4)] == [10, 4, 1, 0]
    assert (held == held_out_rows(labels)).all()


def test_what_cannot_be_fitted_is_refused():
    x, y, x_test, y_test = drawn(6)
    with pytest.raises(ValueError, match="test has 307 rows and 306 labels"):
        linear_probe(x, y, x_test, y_test[1:])
    with pytest.raises(ValueError, match="held out"):
        linear_probe(x[:3], np.arange(3), x_test, y_test)
    with pytest.raises(ValueError, match="above 0"):
        linear_probe(x, y, x_test, y_test, weight_decays=(0.0, 1.0))
