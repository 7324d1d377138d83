from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from iwm_fast.eval.representation import knn
from iwm_fast.eval.representation.knn import knn_classify


def drawn(seed: int, train: int = 83, test: int = 41, width: int = 7, classes: int = 5):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, width))
    labels = [generator.integers(0, classes, n) for n in (train, test)]
    rows = [torch.from_numpy(centres[y] + 1.2 * generator.normal(size=(len(y), width))).float() for y in labels]
    return rows[0], labels[0], rows[1], labels[1]


def one_by_one(train, labels, query, k, temperature):
    """Return (weighted vote, plain vote) for one query, by definition."""
    unit = train.double() / train.double().norm(dim=1, keepdim=True)
    cosine = (unit @ (query.double() / query.double().norm())).tolist()
    nearest = sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]
    weighted, count, near = Counter(), Counter(), Counter()
    for i in nearest:
        weighted[labels[i]] += math.exp(cosine[i] / temperature)
        count[labels[i]] += 1
        near[labels[i]] += cosine[i] + 1
    return max(weighted, key=weighted.get), max(count, key=lambda c: (count[c], near[c]))


@pytest.mark.parametrize("k", [1, 6, 20])
@pytest.mark.parametrize("cells", [2**24, 200], ids=["one block", "many blocks"])
def test_equals_the_definition_query_by_query(k, cells, monkeypatch):
    monkeypatch.setattr(knn, "_CELLS", cells)
    train, y, test, y_test = drawn(k)
    answers = [one_by_one(train, y, query, k, 0.07) for query in test]
    found = knn_classify(train, y, test, y_test, neighbours=k)
    assert found.weighted == pytest.approx(np.mean([a == t for (a, _), t in zip(answers, y_test, strict=True)]))
    assert found.plain == pytest.approx(np.mean([p == t for (_, p), t in zip(answers, y_test, strict=True)]))
    assert found.weighted_interval[0] <= found.weighted <= found.weighted_interval[1]


def test_apart_classes_are_told_apart_and_random_labels_are_not():
    train, y, test, y_test = drawn(0, train=600, test=300)
    clusters = torch.eye(5).repeat(1, 2)
    assert knn_classify(clusters[y], y, clusters[y_test], y_test).weighted == 1
    shuffled = np.random.default_rng(3).permutation(y)
    assert knn_classify(train, shuffled, test, y_test).weighted < 0.35


def test_fewer_images_than_neighbours_are_said():
    train, y, test, y_test = drawn(1, train=9)
    assert knn_classify(train, y, test, y_test).neighbours == 9


def test_labels_that_do_not_fit_are_refused():
    train, y, test, y_test = drawn(1)
    with pytest.raises(ValueError, match="train has 83 rows and 82 labels"):
        knn_classify(train, y[:-1], test, y_test)
    with pytest.raises(ValueError, match="test has 0 rows"):
        knn_classify(train, y, test[:0], y_test[:0])
