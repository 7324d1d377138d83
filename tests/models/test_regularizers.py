"""The regularisers against their formulas in NumPy and float64, one sine and cosine at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from iwm_fast.config import ModelConfig
from iwm_fast.config.encoders import EncoderShape
from iwm_fast.models.losses import ForwardPass, GlobalBatch
from iwm_fast.models.objective import objective_of
from iwm_fast.models.packing import Segments
from iwm_fast.models.regularizers import SigReg, VicReg

LENGTHS = (3, 5, 2)
PADDING = (0, 2)
PATCHES = torch.tensor([0, 4, 8, 0, 1, 2, 3, 4, 8, 5, 0, 0])
WIDTH = 8


def model(**options: object) -> ModelConfig:
    given = {"kind": "sigreg", "directions": 6, "knots": 5} | options
    shape = EncoderShape(depth=1, width=WIDTH, heads=2)
    return ModelConfig.model_validate({"encoder": shape, "image": 9, "patch": 3, "regularizer": given})


def forward_pass(tokens: torch.Tensor, *, padded: bool, **sampled: torch.Tensor) -> ForwardPass:
    real = sum(LENGTHS)
    lengths = (*LENGTHS, *PADDING) if padded else LENGTHS
    segments = Segments.from_lengths(lengths, padding=len(PADDING) if padded else 0)
    tokens = tokens if padded else tokens[:real]
    patches = PATCHES if padded else PATCHES[:real]
    return ForwardPass(tokens, patches, segments, tokens, segments, tokens, None, sampled, lambda x: x)


def rows(tokens: np.ndarray, options: object) -> np.ndarray:
    """Return the rows of the statistic."""
    z = tokens[: sum(LENGTHS)].astype(np.float64).copy()
    if options.center == "position":  # type: ignore[attr-defined]
        places = PATCHES.numpy()[: len(z)]
        for place in set(places):
            z[places == place] -= z[places == place].mean(axis=0)
    if options.on == "pooled":  # type: ignore[attr-defined]
        ends = np.cumsum((0, *LENGTHS))
        z = np.stack([z[a:b].mean(axis=0) for a, b in pairwise(ends)])
    return z


def sigreg(z: np.ndarray, directions: np.ndarray, knots: int, mean_weight: float) -> float:
    t = np.linspace(0, 3, knots)
    phi = np.exp(-(t**2) / 2)
    omega = 2 * (t[1] - t[0]) * phi
    omega[[0, -1]] /= 2
    total = 0.0
    for a in directions.T:
        p = z @ a
        for tj, phij, w in zip(t, phi, omega, strict=True):
            total += w * ((np.cos(tj * p).mean() - phij) ** 2 + np.sin(tj * p).mean() ** 2)
    return total / directions.shape[1] + mean_weight * float((z.mean(axis=0) ** 2).mean())


def vicreg(z: np.ndarray, mean_weight: float) -> float:
    covariance = np.cov(z.T)
    std = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
    apart = covariance - np.diag(np.diag(covariance))
    return std + 0.04 * (apart**2).sum() / WIDTH + mean_weight * float((z.mean(axis=0) ** 2).mean())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("center", ["none", "position"])
@pytest.mark.parametrize("on", ["tokens", "pooled"])
@pytest.mark.parametrize("kind", ["sigreg", "vicreg"])
def test_a_term_equals_its_formula_without_padding(kind: str, on: str, center: str, padded: bool) -> None:
    config = model(kind=kind, on=on, center=center, mean_weight=0.7)
    (_, term) = objective_of(config).terms
    tokens = torch.randn(len(PATCHES), WIDTH, generator=torch.Generator().manual_seed(0)) + 0.3
    sampled = {}
    if isinstance(term, SigReg):
        sampled = {"sigreg": term.sample(3, 5, torch.device("cpu"))}
        expected = sigreg(rows(tokens.numpy(), config.regularizer), sampled["sigreg"].double().numpy(), 5, 0.7)
    else:
        assert isinstance(term, VicReg)
        expected = vicreg(rows(tokens.numpy(), config.regularizer), 0.7)
    leaf = tokens.clone().requires_grad_()
    found = term(forward_pass(leaf, padded=padded, **sampled), 2.5)
    assert float(found.detach()) == pytest.approx(2.5 * expected, rel=2e-5)
    found.backward()
    assert leaf.grad is not None
    assert leaf.grad[: sum(LENGTHS)].abs().max() > 0
    assert not leaf.grad[sum(LENGTHS) :].any()


def test_the_gradient_of_sigreg_equals_the_papers() -> None:
    """∂R/∂p = 2 / (K N) · Σ_j ω_j t_j [S cos(t_j p) − (C − φ_j) sin(t_j p)], backpropagated through p = z · a."""
    term = SigReg(model(knots=9, directions=4).regularizer, 9, WIDTH)
    directions = term.sample(0, 0, torch.device("cpu"))
    tokens = torch.randn(sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    term(forward_pass(tokens, padded=False, sigreg=directions), 1.0).backward()
    z, a = tokens.detach().double().numpy(), directions.double().numpy()
    p, t = z @ a, np.linspace(0, 3, 9)
    phi = np.exp(-(t**2) / 2)
    omega = 2 * (t[1] - t[0]) * phi
    omega[[0, -1]] /= 2
    angles = t[:, None, None] * p
    c, s = np.cos(angles).mean(axis=1, keepdims=True), np.sin(angles).mean(axis=1, keepdims=True)
    shares = (omega * t)[:, None, None] * (s * np.cos(angles) - (c - phi[:, None, None]) * np.sin(angles))
    expected = 2 / p.size * shares.sum(axis=0) @ a.T
    assert tokens.grad is not None
    np.testing.assert_allclose(tokens.grad.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_directions_have_length_1_and_depend_on_seed_and_step_alone() -> None:
    term = SigReg(model().regularizer, 9, WIDTH)
    first = term.sample(1, 2, torch.device("cpu"))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(6))
    assert torch.equal(first, term.sample(1, 2, torch.device("cpu")))
    others = [term.sample(1, 3, torch.device("cpu")), term.sample(2, 2, torch.device("cpu"))]
    assert all(not torch.allclose(first, other) for other in others)
    assert term.sample(2**63 - 1, 10**9, torch.device("cpu")).isfinite().all()


def test_a_gaussian_scores_near_0_and_a_constant_does_not() -> None:
    term = SigReg(model(directions=64).regularizer, 9, WIDTH)
    directions = term.sample(0, 0, torch.device("cpu"))
    segments = Segments.from_lengths((4096,))

    def value(tokens: torch.Tensor) -> float:
        patches = torch.zeros(len(tokens), dtype=torch.int64)
        given = ForwardPass(tokens, patches, segments, tokens, segments, tokens, None, {"sigreg": directions}, sum_none)
        return float(term(given, 1.0))

    gaussian = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(2))
    assert value(gaussian) < 1e-3
    assert value(torch.zeros(4096, WIDTH)) > 0.1
    assert value(3 * gaussian) > 0.1


def sum_none(x: torch.Tensor) -> torch.Tensor:
    return x


def test_the_factor_does_not_depend_on_the_number_of_ranks() -> None:
    objective = objective_of(model(weight=2.0))
    for ranks in (1, 2, 5):
        batch = GlobalBatch(ranks=ranks, micro_batches=ranks, images=30, context=700, predicted=110, width=WIDTH)
        assert objective.factors(batch)[1] == 2.0


def test_no_regulariser_is_the_default() -> None:
    assert [term.name for term in objective_of(ModelConfig()).terms] == ["prediction"]
