"""Parts of a predictor's input, of any sizes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

PARTS = st.fixed_dictionaries(
    {
        "context": st.integers(0, 40),
        "masked": st.one_of(st.none(), st.integers(0, 40)),
        "rows": st.one_of(st.none(), st.integers(0, 40)),
        "seed": st.integers(0, 99),
    }
)


def parts(
    context: int,
    masked: int | None,
    rows: int | None,
    seed: int = 0,
    *,
    width: int,
    patches: int = 9,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Return arguments of `predictor_input` with this many tokens of each part, and a random permutation as places."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    def patch_numbers(count: int) -> Tensor:
        return torch.randint(0, patches, (count,), generator=generator).to(device)

    given = {
        "context": draw(context, width),
        "context_patches": patch_numbers(context),
        "position": draw(patches, width).detach(),
        "place": torch.randperm(context + (masked or 0) + (rows or 0), generator=generator).to(device),
    }
    if masked is not None:
        given |= {"mask_token": draw(width), "predicted_patches": patch_numbers(masked)}
    if rows is not None:
        given["rows"] = draw(rows, width)
    return given
