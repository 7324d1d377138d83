"""Signs of collapse in the target's representation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rank_me", "spread"]


def rank_me(tokens: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv:2210.02885): exp of the entropy of the normalised singular values of (T, D)
    tokens.

    From the eigenvalues of the D × D Gram matrix in float64, which costs less than a decomposition of the tokens
    when T ≫ D. A perfectly collapsed representation gives 1, an isotropic one D; tokens that are not finite give NaN.
    """
    x = tokens.double()
    if not torch.isfinite(x).all():
        return float("nan")
    eigenvalues = torch.linalg.eigvalsh(x.T @ x)
    singular = eigenvalues.clamp_min(0.0).sqrt()
    share = singular / singular.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def spread(tokens: Tensor) -> float:
    """Mean over the D features of the standard deviation across (T, D) tokens; 0 when all tokens are the same."""
    return float(tokens.float().std(dim=0, unbiased=False).mean())
