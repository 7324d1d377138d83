"""A world model with a history, from Python: windows of frames, roll-outs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iwm_fast.actions.external import space_of
from iwm_fast.api import WorldModel
from iwm_fast.config import Config
from iwm_fast.errors import UserError
from iwm_fast.models.iwm import IWM
from iwm_fast.models.window import encode_window, roll_out

PUSHES = {"kind": "continuous", "names": ["push"], "low": [-2], "high": [2], "neutral": [0]}


def world_of(**model):
    tree = {
        "model": {
            "encoder": {"depth": 1, "width": 16, "heads": 2}, "image": 16, "patch": 8, "history": 2,
            "predictor": {"depth": 1, "width": 16, "heads": 2, "conditioning": "block"}, **model,
        },
        "actions": {"groups": ["external"], "external": PUSHES},
        "masks": {"min_context": 1},
    }  # fmt: skip
    config = Config.model_validate(tree)
    torch.manual_seed(0)
    made = IWM(config.model, 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return WorldModel(made, config.actions, space_of(config.actions), chunk=2, unread=config.unread)


@pytest.fixture(scope="module")
def world():
    return world_of()


@pytest.fixture(scope="module")
def frames():
    return torch.randint(0, 256, (3, 2, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_predictions_are_of_windows_and_an_image_stands_for_all_of_its_own(world, frames):
    with torch.no_grad():
        wanted = world.model.predict(encode_window(world.model, frames), torch.full((3, 1), 0.5))
    torch.testing.assert_close(world.predict(frames, {"push": 1.0}), wanted)
    torch.testing.assert_close(world.predict(frames.numpy(), [0.5]), wanted)
    still = world.predict(frames[:, :1].expand(-1, 2, -1, -1, -1), {"push": 1.0})
    torch.testing.assert_close(world.predict(frames[:, 0], {"push": 1.0}), still)
    assert (still - wanted).abs().max() > 1e-4


def test_a_roll_out_feeds_its_predictions_back(world, frames):
    vectors = torch.tensor([[0.5], [-1.0], [0.25]])
    with torch.no_grad():
        wanted = roll_out(world.model, encode_window(world.model, frames), vectors.expand(3, -1, -1))
    assert wanted.shape == (3, 3, 4, 16)
    for actions in (vectors, [{"push": 1.0}, {"push": -2.0}, {"push": 0.5}], vectors.expand(3, -1, -1).numpy()):
        torch.testing.assert_close(world.roll_out(frames, actions), wanted)
    other = np.stack([vectors.numpy(), -vectors.numpy(), vectors.numpy()])
    torch.testing.assert_close(world.roll_out(frames, other)[::2], wanted[::2])


def test_an_action_is_inferred_between_a_window_and_a_frame(world, frames):
    target = frames[0, 1]
    with pytest.warns(UserWarning, match="infer stopped at a bound of push"):
        found = world.infer(frames[:1], target)
    errors = [
        float((world.predict(frames[:1], [v])[0] - world.targets(target)[0]).norm()) for v in np.linspace(-1, 1, 41)
    ]
    assert found.distance <= min(errors) + 1e-4


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda w, f: w.predict(torch.cat([f, f], dim=1), [0.5]),
            "images are windows of 4 frames: this model takes .* 2",
        ),
        (lambda w, f: w.roll_out(f, [0.5]), r"actions are \(1,\) for 3 images: give T actions \(T, 1\)"),
        (lambda w, f: w.roll_out(f, np.zeros((2, 4, 1))), r"actions are \(2, 4, 1\) for 3 images"),
        (lambda w, f: w.roll_out(f, np.zeros((3, 4, 2))), "give 1 numbers"),
        (lambda w, f: w.roll_out(f, np.zeros((3, 0, 1))), r"actions are \(3, 0, 1\) for 3 images"),
    ],
    ids=["window", "one action", "too few", "components", "no step"],
)
def test_a_mistake_is_one_line(world, frames, act, message):
    with pytest.raises(UserError, match=message) as told:
        act(world, frames)
    assert "\n" not in str(told.value)


def test_predictions_of_a_frozen_target_are_not_fed_back(frames):
    frozen = world_of(target="frozen", target_init="w")
    with pytest.raises(UserError, match="roll_out: predictions are in the frozen target's space"):
        frozen.roll_out(frames, [[0.5], [0.5]])
    assert torch.equal(frozen.roll_out(frames, [[0.5]])[:, 0], frozen.predict(frames, [0.5]))
