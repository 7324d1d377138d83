"""Shares of the tokens' energy: of tokens made of known parts, and of networks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.engine.metrics.energy import SHARES, energy_shares


def made(mean: float, position: float, image: float, rest: float, seed: int = 0, images: int = 64, patches: int = 36):
    """Tokens (images · patches, 512) whose parts have these energies, up to sampling."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, energy: float) -> torch.Tensor:
        return math.sqrt(energy) * torch.randn(rows, 512, generator=generator, dtype=torch.float64)

    z = (
        draw(1, mean)[:, None]
        + draw(patches, position)[None]
        + draw(images, image)[:, None]
        + draw(images * patches, rest).view(images, patches, 512)
    )
    return z.flatten(0, 1), torch.arange(images * patches)


@pytest.mark.parametrize(
    "energies", [(0.41, 0.07, 0.19, 0.33), (0.79, 0.01, 0.12, 0.08), (0.0, 0.0, 0.0, 1.0), (0.0, 0.5, 0.5, 0.0)]
)
def test_tokens_made_of_parts_have_their_shares(energies):
    tokens, places = made(*energies)
    shares = energy_shares(tokens, places, 36)
    assert tuple(shares) == SHARES
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(shares.values()) == pytest.approx(energies, abs=0.05)


def test_a_sample_of_the_tokens_has_the_shares_of_all():
    """Means of a few tokens have the noise of the rest in them; it is taken off."""
    tokens, places = made(0.1, 0.1, 0.2, 0.6, images=128, patches=64)
    kept = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))[:2048]
    whole, part = energy_shares(tokens, places, 64), energy_shares(tokens[kept], places[kept], 64)
    assert list(part.values()) == pytest.approx(list(whole.values()), abs=0.03)


def test_a_constant_is_all_mean():
    shares = energy_shares(torch.ones(40, 3), torch.arange(40), 10)
    assert list(shares.values()) == pytest.approx([1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("tokens", [torch.zeros(40, 3), torch.full((40, 3), float("inf")), torch.ones(3, 3)])
def test_what_has_no_shares_gives_nan(tokens):
    assert all(math.isnan(share) for share in energy_shares(tokens, torch.arange(len(tokens)), 10).values())


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 60), width=st.integers(1, 5), patches=st.integers(1, 9), seed=st.integers(0, 99))
def test_shares_are_of_one_whole_or_nan(rows, width, patches, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, width, generator=generator)
    places = torch.randint(0, 4 * patches, (rows,), generator=generator)
    shares = energy_shares(tokens, places, patches)
    if not any(math.isnan(share) for share in shares.values()):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(0 <= share <= 1 for share in shares.values())
