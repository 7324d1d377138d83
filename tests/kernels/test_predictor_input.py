"""predictor_input against an evaluation token by token, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictor_parts import PARTS, parts
from torch import Tensor

from iwm_fast.kernels import predictor_input, predictor_input_bytes, predictor_input_flops


def plain(
    context: Tensor,
    context_patches: Tensor,
    position: Tensor,
    place: Tensor,
    mask_token: Tensor | None = None,
    predicted_patches: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Evaluate token by token, in the order of the parts, and look up each one's place."""
    tokens = [row + position[p] for row, p in zip(context, context_patches, strict=True)]
    if mask_token is not None and predicted_patches is not None:
        tokens += [mask_token + position[p] for p in predicted_patches]
    tokens += [] if rows is None else list(rows)
    where = place.tolist()
    return torch.stack([tokens[where.index(n)] for n in range(len(where))])


@settings(max_examples=60, deadline=None)
@given(shape=PARTS, width=st.integers(1, 7))
def test_values_and_gradients(shape: dict[str, Any], width: int) -> None:
    given = parts(**shape, width=width, dtype=torch.float64)
    leaves = [t for t in given.values() if t.requires_grad]
    ours = predictor_input(**given)
    if not len(ours):
        assert ours.shape == (0, width)
        return
    theirs = plain(**given)
    assert torch.equal(ours, theirs)
    upstream = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(out, leaves, upstream, materialize_grads=True) for out in (ours, theirs))
    torch.testing.assert_close(found, wanted)


def test_positions_get_no_gradient() -> None:
    given = parts(3, 2, 0, width=4, dtype=torch.float64)
    given["position"].requires_grad_()
    predictor_input(**given).sum().backward()
    assert given["position"].grad is None
    assert given["mask_token"].grad is not None


REFUSED = {
    "context": ({"context": torch.zeros(3)}, "context has shape"),
    "context_patches": ({"context_patches": torch.zeros(2, dtype=torch.int64)}, "context_patches has shape"),
    "context_patches type": ({"context_patches": torch.zeros(3)}, "context_patches is torch.float32"),
    "context_patches range": ({"context_patches": torch.tensor([0, 9, 1])}, "context_patches spans 0 to 9; position"),
    "predicted_patches range": ({"predicted_patches": torch.tensor([-1, 2])}, "predicted_patches spans -1 to 2"),
    "predicted_patches": ({"predicted_patches": None}, "predicted_patches is missing"),
    "mask_token": ({"mask_token": None}, "mask_token is missing"),
    "mask_token shape": ({"mask_token": torch.zeros(3, dtype=torch.float64)}, "mask_token has shape"),
    "position": ({"position": torch.zeros(9, 3, dtype=torch.float64)}, "position has shape"),
    "rows": ({"rows": torch.zeros(1, 4)}, "rows is torch.float32"),
    "place": ({"place": torch.arange(5)}, "place has shape"),
    "place range": ({"place": torch.tensor([0, 1, 2, 3, 4, 6])}, "place spans 0 to 6"),
    "place twice": ({"place": torch.tensor([0, 1, 2, 3, 4, 4])}, "place names a row twice"),
    "triton in float64": ({"backend": "triton"}, "context is torch.float64; backend .triton. needs"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor_input(**(parts(3, 2, 1, width=4, patches=9, dtype=torch.float64) | change))


def test_counts_by_hand() -> None:
    assert predictor_input_bytes(3, 2, 1, 4) == 2 * 4 * (6 + 2 + 2) + 8 * (6 + 5)
    assert predictor_input_bytes(3, 2, 1, 4, backward=True, element=4) == 4 * 4 * (6 + 2 + 2) + 8 * 6
    assert predictor_input_flops(3, 2, 4) == 20
    assert predictor_input_flops(3, 2, 4, backward=True) == 8
