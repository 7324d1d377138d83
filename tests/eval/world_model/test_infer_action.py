from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import ActionsConfig
from iwm_fast.data.views.sampling import draw_bank
from iwm_fast.eval.world_model.infer_action import jitter_bounds, search_action

SPACE = ActionSpace()
BOX = jitter_bounds(ActionsConfig(), SPACE)


def bent(dim, seed=0, out=40):
    """A smooth, nonlinear prediction that maps different actions to different places."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator) for shape in ((dim, 12), (12, out)))
    return lambda actions: torch.tanh(actions @ first) @ second


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(0, 20))
def test_an_action_that_explains_the_target_exactly_is_found(drawn, seed):
    low, high = (torch.from_numpy(end) for end in BOX)
    true = low + (high - low) * torch.rand(len(low), generator=torch.Generator().manual_seed(drawn))
    answer = bent(SPACE.dim, seed)
    found = search_action(answer, answer(true[None])[0], BOX)
    # Predictions are fp32, whose rounding is 1e-7 of values of size 10.
    np.testing.assert_allclose(found.action, true.numpy(), atol=2e-4)
    assert found.distance < 1e-3


def test_an_action_on_the_edge_of_the_box_is_found_and_none_beyond_it():
    answer = bent(SPACE.dim)
    high = torch.from_numpy(BOX[1])
    np.testing.assert_allclose(search_action(answer, answer(high[None])[0], BOX).action, BOX[1], atol=2e-4)
    beyond = search_action(answer, answer(3 * high[None])[0], BOX).action
    assert (BOX[0] <= beyond).all()
    assert (beyond <= BOX[1]).all()


def test_a_deaf_predictor_gives_the_neutral_action_and_a_fixed_component_stays():
    assert not search_action(lambda a: torch.ones(len(a), 3), torch.zeros(3), BOX).action.any()
    low, high = BOX[0].copy(), BOX[1].copy()
    low[0] = high[0] = 0.25
    assert search_action(bent(SPACE.dim), torch.zeros(40), (low, high)).action[0] == 0.25
    with pytest.raises(ValueError, match="must not be above"):
        search_action(bent(SPACE.dim), torch.zeros(40), (BOX[1], BOX[0]))


def test_the_same_search_gives_the_same_action_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = (search_action(bent(SPACE.dim), torch.ones(40), BOX) for _ in range(2))
    assert np.array_equal(first.action, second.action)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["difference", "absolute"])
@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_the_box_holds_every_action_that_training_samples_and_nothing_else_moves(form, strength):
    actions, space = ActionsConfig(strength=strength), ActionSpace(("photometric", "geometric"), form)
    low, high = jitter_bounds(actions, space)
    drawn = space.jitter_action(draw_bank(actions, 0, 0, 500), draw_bank(actions, 0, 1, 500))
    told = [i for i, name in enumerate(space.names) if name.split("_")[-1] in ("brightness", "contrast", "saturation")]
    assert (drawn[:, told] >= low[told] - 1e-6).all()
    assert (drawn[:, told] <= high[told] + 1e-6).all()
    # Nearly all of the box is used: it is no wider than what is sampled.
    if form == "absolute" or strength < 3:
        assert (drawn[:, told].max(axis=0) > 0.8 * high[told]).all()
    moving = {name for name, a, b in zip(space.names, low, high, strict=True) if b > a}
    assert {name.split("_")[-1] for name in moving} == {"brightness", "contrast", "saturation", "hue"}


def test_a_component_that_training_never_moved_is_not_searched():
    low, high = jitter_bounds(ActionsConfig(hue=0.0), SPACE)
    assert [name for name, a, b in zip(SPACE.names, low, high, strict=True) if b > a] == [
        "brightness",
        "contrast",
        "saturation",
    ]
