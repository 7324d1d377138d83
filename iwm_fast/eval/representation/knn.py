"""k-nearest-neighbour classification on frozen features, with DINO's protocol (facebookresearch/dino, eval_knn.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iwm_fast.eval.stats import Interval, bootstrap_interval

__all__ = ["NEIGHBOURS", "TEMPERATURE", "KnnResult", "knn_classify"]

NEIGHBOURS = 20
TEMPERATURE = 0.07
_CELLS = 2**24  # similarities held at once: 64 MiB of float32


@dataclass(frozen=True)
class KnnResult:
    """Top-1 accuracies in [0, 1]: votes weighted by exp(cosine / temperature), and plain votes."""

    weighted: float
    weighted_interval: Interval
    plain: float
    plain_interval: Interval
    neighbours: int
    temperature: float


def knn_classify(
    train: Tensor,
    train_labels: np.ndarray,
    test: Tensor,
    test_labels: np.ndarray,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> KnnResult:
    """Classify ``test`` (m, D) by the cosine-nearest rows of ``train`` (n, D); labels int64 of matching length.

    ``neighbours`` is reduced to n if there are fewer images, and the result says so. Equal plain votes go to the class
    with nearer neighbours. Raise ValueError if rows and labels differ in number or there are none.
    """
    for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if len(rows) != len(labels) or not len(rows):
            raise ValueError(f"{name} has {len(rows)} rows and {len(labels)} labels; they must be equal and not 0")
    neighbours = min(neighbours, len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    reference = F.normalize(train.float(), dim=1)
    votes = torch.from_numpy(np.asarray(train_labels, dtype=np.int64)).to(reference.device)
    truth = torch.from_numpy(np.asarray(test_labels, dtype=np.int64)).to(reference.device)
    weighted, plain = [], []
    rows_at_once = max(1, _CELLS // len(reference))
    for rows, labels in zip(test.split(rows_at_once), truth.split(rows_at_once), strict=True):
        similarity, index = (F.normalize(rows.float(), dim=1) @ reference.T).topk(neighbours, dim=1)  # (b, k)
        voters = votes[index]
        empty = similarity.new_zeros(len(rows), classes)
        weight = empty.scatter_add(1, voters, (similarity / temperature).exp())
        # At most half a vote, so that it only breaks ties: k values of at most 2 sum to at most 2k.
        nearness = empty.scatter_add(1, voters, similarity + 1) / (4 * neighbours)
        count = empty.scatter_add(1, voters, torch.ones_like(similarity)) + nearness
        weighted.append(weight.argmax(dim=1) == labels)
        plain.append(count.argmax(dim=1) == labels)
    right, right_plain = (torch.cat(hits).double().cpu().numpy() for hits in (weighted, plain))
    return KnnResult(
        weighted=float(right.mean()),
        weighted_interval=bootstrap_interval(right),
        plain=float(right_plain.mean()),
        plain_interval=bootstrap_interval(right_plain),
        neighbours=neighbours,
        temperature=temperature,
    )
