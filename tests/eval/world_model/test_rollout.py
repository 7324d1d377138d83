"""Roll-outs: which triplets form a chain, and the errors of worlds with known dynamics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_triplets import write_game, write_lines
from small_run import small_config
from torch import nn

from iwm_fast.actions.external import space_of
from iwm_fast.data.triplets import read_triplets, resolve_triplets
from iwm_fast.errors import UserError
from iwm_fast.eval.report.terminal import result_rows
from iwm_fast.eval.world_model.frames import FrameReader, find_triplets
from iwm_fast.eval.world_model.rollout import chains, measure_rollouts, rollout_errors
from iwm_fast.models.iwm import IWM


def row(source, target, **more):
    return {"source": source, "target": target, "action": 0, **more}


def test_chains_follow_the_files(tmp_path):
    rows = [row("a", "b"), row("x", "y"), row("b", "c"), row("c", "d"), row("y", "b")]
    triplets = read_triplets(write_lines(tmp_path / "m.jsonl", *rows))
    assert chains(triplets, 1).tolist() == [[0], [1], [2], [3], [4]]
    assert sorted(chains(triplets, 3).tolist()) == [[0, 2, 3], [1, 4, 2], [4, 2, 3]]
    assert sorted(chains(triplets, 4).tolist()) == [[1, 4, 2, 3]]
    assert len(chains(triplets, 5)) == 0


def test_a_chain_ends_where_the_way_on_is_not_known_and_stays_in_its_episode(tmp_path):
    twice = [row("a", "b"), row("b", "c"), row("b", "d")]
    assert len(chains(read_triplets(write_lines(tmp_path / "m.jsonl", *twice)), 2)) == 0
    parted = [row("a", "b", episode=0), row("b", "c", episode=1), row("b", "d", episode=0)]
    assert chains(read_triplets(write_lines(tmp_path / "n.jsonl", *parted)), 2).tolist() == [[0, 2]]
    numbered = [row("a", "b", step=0), row("b", "a", step=1), row("a", "b", step=2), row("b", "c", step=4)]
    assert chains(read_triplets(write_lines(tmp_path / "o.jsonl", *numbered)), 2).tolist() == [[0, 1], [1, 2]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4), st.randoms())
def test_of_episodes_of_any_length_in_any_order_every_window_is_a_chain(tmp_path_factory, lengths, horizon, random):
    rows = [row(f"{e}-{s}", f"{e}-{s + 1}", episode=e, step=s) for e, n in enumerate(lengths) for s in range(n)]
    random.shuffle(rows)
    path = tmp_path_factory.mktemp("chains") / "m.jsonl"
    found = chains(read_triplets(write_lines(path, *rows)), horizon)
    named = {tuple((rows[i]["episode"], rows[i]["step"]) for i in chain) for chain in found.tolist()}
    wanted = {
        tuple((e, s + h) for h in range(horizon)) for e, n in enumerate(lengths) for s in range(max(0, n - horizon + 1))
    }
    assert named == wanted
    assert len(found) == len(wanted)


class Line(nn.Module):
    """A picture is one number, its first level; an action is added to it, with an error of `bias` each time."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def encode(self, images, which="context"):  # noqa: ARG002  (the model's signature)
        return images[:, :1, :1, 0].float()

    def targets(self, images):
        return self.encode(images)

    def predict(self, z, action):
        return z + action[:, None, :1] + self.bias


def test_errors_are_those_of_the_horizon():
    """With a bias of b per step the prediction is h·b off; a copy is the sum of h actions off; by hand."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(0, 9, (5, 4, 1), generator=generator)
    levels = torch.cat([torch.full((5, 1, 1), 10), 10 + actions.cumsum(dim=1)], dim=1)  # (5, 5, 1)
    frames = levels[..., None, None].expand(5, 5, 1, 1, 3).to(torch.uint8)
    errors = rollout_errors(Line(0.5), frames, actions.float(), chunk=2)
    horizon = np.arange(1, 5)
    np.testing.assert_allclose(errors["model"], np.broadcast_to((0.5 * horizon) ** 2, (5, 4)), rtol=1e-6)
    moved = actions[..., 0].cumsum(dim=1).double().numpy()
    np.testing.assert_allclose(errors["copy"], moved**2, rtol=1e-6)
    others = np.roll(moved, -1, axis=0)
    np.testing.assert_allclose(errors["shuffled"], (others + 0.5 * horizon - moved) ** 2, rtol=1e-6)


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    return write_game(tmp_path_factory.mktemp("game"), episodes=3, steps=5)


def test_a_real_model_s_predictions_are_fed_back_unchanged(game):
    config, triplets = resolve_triplets(small_config(game, actions__groups=["external"]))
    torch.manual_seed(0)
    model = IWM(config.model, space_of(config.actions).dim).eval()
    rows = chains(triplets, 3)
    places = np.concatenate([triplets.source[rows[:, :1]], triplets.target[rows]], axis=1)
    pictures, good = FrameReader(triplets, config.model.image, config.data).read(places.reshape(-1))
    assert good.all()
    frames = pictures.unflatten(0, places.shape)
    actions = torch.from_numpy(triplets.vectors()[rows])
    errors = rollout_errors(model, frames, actions, chunk=4)
    with torch.no_grad():
        for i in range(len(rows)):
            z = model.encode(frames[i, :1])
            for h in range(3):
                z = model.predict(z, actions[i, h : h + 1])
                want = (z - model.targets(frames[i, h + 1 : h + 2])).double().square().mean()
                assert errors["model"][i, h] == pytest.approx(float(want), rel=1e-4)


def test_a_history_begins_with_the_frames_before_and_slides(game):
    config, triplets = resolve_triplets(small_config(game, actions__groups=["external"], model__history=3))
    torch.manual_seed(0)
    model = IWM(config.model, space_of(config.actions).dim).eval()
    reader = FrameReader(triplets, config.model.image, config.data)
    found = measure_rollouts(model, reader, 2, history=3, starts=99)
    rows = chains(triplets, 2)
    wanted = np.zeros(2)
    with torch.no_grad():
        for chain in rows:
            first = chain[0] - triplets.step[chain[0]]
            seen = [triplets.source[max(chain[0] - back, first)] for back in (2, 1, 0)]
            frames, _ = reader.read(np.array([*seen, *triplets.target[chain]]))
            told = torch.from_numpy(triplets.vectors()[chain])[:, None]
            a, b, c = (model.encode(frame[None]) for frame in frames[:3])
            one = model.predict(torch.cat([a, b, c], dim=1), told[0])
            two = model.predict(torch.cat([b, c, one], dim=1), told[1])
            truth = model.targets(frames[3:])
            wanted += [float((p[0] - t).double().square().mean()) for p, t in zip((one, two), truth, strict=True)]
    np.testing.assert_allclose(found["model"], wanted / len(rows), rtol=1e-4)


def test_means_have_intervals_and_begin_at_chains_spread_over_the_set(game):
    config, triplets = resolve_triplets(small_config(game, actions__groups=["external"]))
    found = measure_rollouts(Line(), FrameReader(triplets, config.model.image, config.data), 3, starts=5)
    assert (found["horizons"], found["starts"]) == ([1, 2, 3], 5)
    for name in ("model", "shuffled", "copy"):
        for mean, (low, high) in zip(found[name], found[f"{name}_interval"], strict=True):
            assert low <= mean <= high
    assert (
        "fewer than two chains of 9 consecutive triplets"
        in measure_rollouts(Line(), FrameReader(triplets, config.model.image, config.data), 9)["reason"]
    )


def test_the_test_set_is_found_under_the_names_of_splits(tmp_path):
    write_game(tmp_path / "train")
    with pytest.raises(UserError, match="this is no manifest of triplets"):
        find_triplets(tmp_path)
    val = write_game(tmp_path / "Val")
    assert find_triplets(tmp_path) == (val, [])
    assert find_triplets(val) == (val, [])
    test = write_game(tmp_path / "test")
    assert find_triplets(tmp_path) == (test, [str(val)])
    write_game(tmp_path / "Testing")
    with pytest.raises(UserError, match="both hold test triplets; give one of them"):
        find_triplets(tmp_path)


def test_a_rollout_has_rows_in_the_table():
    two = {"horizons": [1, 2], "starts": 5, "model": [0.25, 0.5], "shuffled": [0.75, 1.0], "copy": [1.5, 2.0]}
    rolled = two | {f"{name}_interval": [[0.0, 1.0], [0.0, 2.0]] for name in ("model", "shuffled", "copy")}
    table = result_rows({"rollout": rolled})
    assert table[0] == ["roll-out, error, 1 ahead", "0.2500", "0.0000 – 1.0000", "", "0.7500", "", ""]
    assert table[1][:2] == ["roll-out, error of a copy, 1 ahead", "1.5000"]
    assert table[2][:3] == ["roll-out, error, 2 ahead", "0.5000", "0.0000 – 2.0000"]
    assert len(table) == 4
    assert result_rows({"not_run": {"rollout": "why"}}) == []
