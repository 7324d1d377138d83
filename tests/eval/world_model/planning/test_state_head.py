"""Heads that read a state: what is shown is read and compared, what is not shown does not count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_images import encode
from made_triplets import HEADER, write_lines
from PIL import Image
from worlds import SIDE, tiny_config, tiny_model

from iwm_fast.actions.external import space_of
from iwm_fast.api import WorldModel
from iwm_fast.config import ActionsConfig
from iwm_fast.config.external import ExternalActions
from iwm_fast.errors import UserError
from iwm_fast.models.iwm import IWM

PUSHES = {"kind": "continuous", "names": ("push", "turn"), "low": (-2, 0), "high": (1, 4), "neutral": (0, 0)}
EPISODES, STEPS = 25, 8


@pytest.fixture(scope="module")
def world():
    actions = ActionsConfig(groups=("external",), external=ExternalActions(**PUSHES))
    space = space_of(actions)
    torch.manual_seed(0)
    network = IWM(tiny_config().model, space.dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return WorldModel(network, actions, space)


def write_lit(folder, *, shown=True, episodes=EPISODES):
    """Write pictures of random grey light: their states are the light, a random number, and 7. Return all lights."""
    random = np.random.default_rng(0)
    lights = random.integers(40, 200, (episodes, STEPS + 1))
    hidden = random.normal(size=lights.shape)
    rows = []
    for episode in range(episodes):
        for step in range(STEPS + 1):
            light = lights[episode, step] if shown else 90
            pixels = np.full((SIDE, SIDE, 3), light, np.uint8)
            (folder / "frames").mkdir(parents=True, exist_ok=True)
            (folder / "frames" / f"{episode}_{step}.png").write_bytes(encode(Image.fromarray(pixels), "PNG"))
        states = [[float(lights[episode, s]), hidden[episode, s], 7.0] for s in range(STEPS + 1)]
        rows += [
            {
                "source": f"frames/{episode}_{step}.png", "target": f"frames/{episode}_{step + 1}.png",
                "action": [0.0, 1.0], "episode": episode, "step": step,
                "source_state": states[step], "target_state": states[step + 1],
            }
            for step in range(STEPS)
        ]  # fmt: skip
    write_lines(folder / "manifest.jsonl", HEADER, *rows)
    return lights


@pytest.fixture(scope="module")
def lit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lit")
    return folder, write_lit(folder)


def test_what_is_shown_is_read_and_what_is_not_has_no_weight(world, lit):
    folder, lights = lit
    head = world.state_head(folder)
    assert head.r2[0] > 0.95
    assert head.r2[1] < 0.2
    assert head.r2[2] == 0
    dark, bright = (torch.full((1, SIDE, SIDE, 3), light, dtype=torch.uint8) for light in (60, 180))
    read = head(world.targets(torch.cat([dark, bright])))
    np.testing.assert_allclose(read[:, 0], [60, 180], atol=15)
    # By hand: differences in stds of the recorded states, each times the root of its R².
    difference = (read[0] - read[1]).double().numpy()
    spread = lights.std()
    want = abs(difference[0]) / spread * np.sqrt(head.r2[0])
    assert float(head.scale[2]) == 0
    if head.r2[1] <= 0:
        assert float(head.scale[1]) == 0
        assert float(head.distance(world.targets(dark), world.targets(bright))) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_a_plan_s_costs_are_distances_of_the_states_that_are_read(world, lit, method):
    head = world.state_head(lit[0])
    now, goal = (torch.full((1, SIDE, SIDE, 3), light, dtype=torch.uint8) for light in (60, 180))
    told = {"horizon": 2, "candidates": 16, "iterations": 3, "method": method}
    plan = world.plan(now, goal, distance="state", head=head, **told)
    wanted = head(world.targets(goal))
    far = ((head(plan.predictions) - wanted) * head.scale).norm(dim=1)
    np.testing.assert_allclose(plan.along, far, rtol=1e-4)
    assert plan.cost == pytest.approx(float(far[-1]), rel=1e-4)
    assert plan.distance_now == pytest.approx(float(head.distance(world.targets(now), world.targets(goal))), rel=1e-4)


def test_mistakes_are_one_line(world, lit, tmp_path):
    frame = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"distance is state: give head, which WorldModel\.state_head returns"):
        world.plan(frame, frame, distance="state", horizon=1, candidates=2)
    write_lit(tmp_path / "dark", shown=False)
    with pytest.raises(UserError, match=r"no component of the state can be read .* \(R² by component: "):
        world.state_head(tmp_path / "dark")
    write_lit(tmp_path / "short", episodes=2)
    with pytest.raises(UserError, match="18 frames; a state head needs at least 20"):
        world.state_head(tmp_path / "short")
    manifest = (lit[0] / "manifest.jsonl").read_text().replace('"source_state"', '"x"')
    rows = [line.split(', "x"')[0] + "}" if '"x"' in line else line for line in manifest.splitlines()]
    write_lines(tmp_path / "none" / "manifest.jsonl", *rows)
    with pytest.raises(UserError, match="no states are recorded, which a state head is fitted to"):
        world.state_head(tmp_path / "none")
    images, space = tiny_model(tiny_config())
    with pytest.raises(UserError, match="state_head: this run was trained on images"):
        WorldModel(images, ActionsConfig(), space).state_head(lit[0])
