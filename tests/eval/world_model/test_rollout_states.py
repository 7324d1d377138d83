"""The state that is read from roll-outs, of a world with known dynamics and a known error."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_images import encode
from made_triplets import write_lines
from PIL import Image
from torch import nn

from iwm_fast.config import DataConfig
from iwm_fast.data.triplets import read_triplets
from iwm_fast.eval.report.dates import Dated
from iwm_fast.eval.report.sections.rollout_curves import RolloutDrawing
from iwm_fast.eval.world_model.frames import FrameReader
from iwm_fast.eval.world_model.rollout import chains, measure_rollouts

SIDE, STEPS = 8, 6
MOST = 9  # an action is encoded in units of the largest
HEADER = {
    "schema": "iwm-fast-triplets/1",
    "actions": {"kind": "continuous", "names": ["light"], "low": [-MOST], "high": [MOST]},
}


class Light(nn.Module):
    """Represents a picture by its light, in units of `unit`; a prediction adds the action, and an error of `bias`."""

    config = SimpleNamespace(image=SIDE)

    def __init__(self, bias, unit):
        super().__init__()
        self.bias, self.unit = nn.Parameter(torch.tensor(bias)), unit

    def encode(self, images, which="context"):  # noqa: ARG002  (the model's signature)
        return images[:, :1, :1, 0].float() * self.unit

    def targets(self, images):
        return self.encode(images)

    def predict(self, z, action):
        return z + (action[:, None, :1] * MOST + self.bias) * self.unit


def write_lights(path, *, episodes=24, states=True, numbered=True):
    """Write pictures of grey light; their states are the light, its negative, a random number, and 7."""
    random = np.random.default_rng(0)
    rows = []
    for episode in range(episodes):
        lights = np.cumsum([100, *random.integers(-MOST, MOST + 1, STEPS)]).tolist()
        told = [[float(light), -float(light), float(random.normal()), 7.0] for light in lights]
        for place, light in enumerate(lights):
            picture = Image.fromarray(np.full((SIDE, SIDE, 3), light, np.uint8))
            (path.parent / f"{episode}_{place}.png").write_bytes(encode(picture, "PNG"))
        for step in range(STEPS):
            row = {"source": f"{episode}_{step}.png", "target": f"{episode}_{step + 1}.png"}
            row["action"] = [float(lights[step + 1] - lights[step])]
            row |= {"episode": episode, "step": step} if numbered else {}
            row |= {"source_state": told[step], "target_state": told[step + 1]} if states else {}
            rows.append(row)
    return read_triplets(write_lines(path, HEADER, *rows))


def measured(triplets, bias, unit=1.0, horizon=3):
    return measure_rollouts(
        Light(bias, unit), FrameReader(triplets, SIDE, DataConfig(device="cpu")), horizon, starts=999
    )


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_r2_is_that_of_the_known_error_in_any_unit(tmp_path, unit):
    """With a bias of b per step the light is h · b off after h steps."""
    triplets = write_lights(tmp_path / "manifest.jsonl")
    found = measured(triplets, 2.0, unit)["state_r2"]
    true = triplets.states[triplets.target[chains(triplets, 3)]]
    horizon = np.arange(1, 4)
    for component in (0, 1):
        wanted = 1 - (2.0 * horizon) ** 2 / true[..., component].var()
        np.testing.assert_allclose([row[component] for row in found["prediction"]], wanted, atol=0.02)
        assert found["target"][component] == pytest.approx(1.0, abs=1e-3)
    assert found["target"][2] < 0.1  # a random number is not shown
    assert [row[3] for row in found["prediction"]] == [None] * 3  # 7 does not vary


def test_a_head_is_not_fitted_on_the_episodes_that_it_reads(tmp_path):
    """The light in odd episodes and 0 in even ones: a head of both halves would be half wrong, not quite wrong."""
    triplets = write_lights(tmp_path / "manifest.jsonl")
    triplets.states[:, 2] = 0.0
    for row in np.flatnonzero(triplets.episode % 2):
        triplets.states[triplets.target[row], 2] = triplets.states[triplets.target[row], 0]
    found = measured(triplets, 0.0)["state_r2"]
    assert found["target"][2] < 0


class Training(Light):
    """Represents everything by 0 in training mode."""

    def targets(self, images):
        return self.encode(images) * (not self.training)


def test_heads_are_fitted_on_the_representations_that_they_read(tmp_path):
    """A model in training mode, as between two steps: heads and roll-outs are both of evaluation mode."""
    triplets = write_lights(tmp_path / "manifest.jsonl")
    model = Training(0.0, 1.0).train()
    found = measure_rollouts(model, FrameReader(triplets, SIDE, DataConfig(device="cpu")), 3, starts=999)
    assert found["state_r2"]["target"][0] == pytest.approx(1.0, abs=1e-3)
    assert model.training


@pytest.mark.parametrize("lacks", ["states", "numbered"])
def test_without_states_or_episodes_there_is_no_r2(tmp_path, lacks):
    triplets = write_lights(tmp_path / "manifest.jsonl", **{lacks: False})
    assert "state_r2" not in measured(triplets, 0.0)


def test_too_few_frames_are_not_read(tmp_path):
    triplets = write_lights(tmp_path / "manifest.jsonl", episodes=4)
    assert "state_r2" not in measured(triplets, 0.0)


def test_the_page_and_the_terminal_show_it(tmp_path):
    rolled = measured(write_lights(tmp_path / "manifest.jsonl"), 2.0)
    rows = [row for row in RolloutDrawing(()).rows({"rollout": rolled}) if "R²" in row[0]]
    assert [row[0] for row in rows] == [f"roll-out, R² of the state, {h} ahead" for h in (1, 2, 3)]
    first = rolled["state_r2"]["prediction"][0]
    assert rows[0][1] == ", ".join(f"{value:.2f}" for value in first[:3])  # the constant one is left out
    section = RolloutDrawing(()).section({"rollout": rolled}, Dated())
    assert section is not None
    (table,) = [block for block in section.blocks if getattr(block, "head", [""])[0] == "state, R²"]
    assert [len(row) for row in table.rows] == [5] * 4
