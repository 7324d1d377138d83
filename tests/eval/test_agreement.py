"""Our probes against scikit-learn's on the same features: they agree within our own interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_run import small_config

from iwm_fast.data.tools.synth import draw_images
from iwm_fast.eval.features import read_features
from iwm_fast.eval.finetune.fitting import Plan, fit, measure
from iwm_fast.eval.finetune.modes import reader_builder
from iwm_fast.eval.finetune.tasks import Task
from iwm_fast.eval.representation.knn import knn_classify
from iwm_fast.eval.representation.linear import linear_probe
from iwm_fast.eval.splits import TensorSplit
from iwm_fast.models.iwm import IWM
from iwm_fast.models.task_model import HeadShape

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed (extras: test)")
CLASSES = 6
TINTS = np.array([[50, 0, 0], [0, 50, 0], [0, 0, 50], [-50, 0, 0], [0, -50, 0], [0, 0, -50]])


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Return mean tokens of generated shapes, from a network of random weights: correlated channels, as in practice."""
    config = small_config(tmp_path_factory.mktemp("none"))
    torch.manual_seed(0)
    model = IWM(config.model, 9)
    parts = []
    for count, seed in ((1200, 0), (600, 1)):
        labels = np.arange(count) % CLASSES
        drawn = draw_images(labels, 32, np.random.default_rng(seed)).astype(int)
        drawn += TINTS[labels][:, None, None]  # random weights do not separate shapes alone
        images = torch.from_numpy(drawn.clip(0, 255).astype(np.uint8))
        split = TensorSplit(images, labels, tuple("abcdef"))
        parts.append(read_features([model.encoder], split, "pooled")[0])
    return model, *parts


def test_the_linear_probe_agrees_with_logistic_regression(features):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    _, train, test = features
    ours = linear_probe(torch.from_numpy(train.values), train.labels, torch.from_numpy(test.values), test.labels)
    scale = StandardScaler().fit(train.values)
    # Our decay is of the mean loss, scikit-learn's C of its sum.
    theirs = LogisticRegression(C=1 / (ours.weight_decay * len(train)), max_iter=20_000, tol=1e-6)
    theirs.fit(scale.transform(train.values), train.labels)
    accuracy = theirs.score(scale.transform(test.values), test.labels)
    assert ours.top1 > 1.5 / CLASSES  # above chance, where agreement would mean nothing
    assert ours.top1_interval[0] <= accuracy <= ours.top1_interval[1]
    assert accuracy == pytest.approx(ours.top1, abs=0.01)  # six of 600 predictions near the border


def test_plain_votes_agree_with_k_nearest_neighbours(features):
    from sklearn.neighbors import KNeighborsClassifier

    _, train, test = features
    ours = knn_classify(torch.from_numpy(train.values), train.labels, torch.from_numpy(test.values), test.labels)
    theirs = KNeighborsClassifier(ours.neighbours, metric="cosine", algorithm="brute").fit(train.values, train.labels)
    accuracy = theirs.score(test.values, test.labels)
    assert ours.plain > 1.2 / CLASSES
    assert ours.plain_interval[0] <= accuracy <= ours.plain_interval[1]


def test_weighted_votes_agree_with_k_nearest_neighbours(features):
    from sklearn.neighbors import KNeighborsClassifier

    _, train, test = features
    ours = knn_classify(torch.from_numpy(train.values), train.labels, torch.from_numpy(test.values), test.labels)
    theirs = KNeighborsClassifier(
        ours.neighbours, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / ours.temperature)
    ).fit(train.values, train.labels)
    accuracy = theirs.score(test.values, test.labels)
    assert accuracy == pytest.approx(ours.weighted, abs=2 / len(test))  # ties at the last neighbour


def test_a_fitted_linear_head_agrees_with_logistic_regression(features):
    """The head trained by steps, at its best learning rate, ends where the solved one is."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    model, train, test = features
    task = Task.of("shapes", HeadShape(CLASSES, dense=False), train, test)
    plan = Plan(rates=(1e-3, 1e-2, 3e-2), steps=600, batch=128, weight_decay=1e-4)
    found = fit(reader_builder(model, "linear", "pretrained", {"shapes": task.shape}, "context"), [task], plan)
    ours = measure(found.reader, task, test).summary()
    scale = StandardScaler().fit(train.values[~task.held])
    theirs = LogisticRegression(C=10, max_iter=5000)
    theirs.fit(scale.transform(train.values[~task.held]), train.labels[~task.held])
    accuracy = theirs.score(scale.transform(test.values), test.labels)
    low, high = ours["top1_interval"]
    assert low <= accuracy <= high
