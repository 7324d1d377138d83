"""MRR among next frames: scores of an oracle, a model that ignores the action, and a collapsed one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import encode
from made_triplets import write_lines
from worlds import Pixels, tiny_config

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config, DataConfig
from iwm_fast.data.triplets import read_triplets
from iwm_fast.errors import UserError
from iwm_fast.eval.reduced import reduced_lines
from iwm_fast.eval.stats import chance_mrr
from iwm_fast.eval.world_model.frames import FrameReader, open_triplets
from iwm_fast.eval.world_model.next_frames import (
    draw_next_frames,
    rank_next_frames,
    shuffled_actions,
    summarise_next_frames,
)
from iwm_fast.eval.world_model.triplets import evaluate_triplets, monitor_triplets
from iwm_fast.models.iwm import IWM

SIDE = 8
PLACES = 32  # positions of a bright dot on a board of 8 × 8


def board(place):
    picture = np.full((SIDE, SIDE, 3), 20, np.uint8)
    picture[place // SIDE, place % SIDE] = 200
    return picture


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    """Write a game: an action of -3 to 3 moves a dot along a ring; three walks of 40, and their last frames."""
    root = tmp_path_factory.mktemp("ring")
    for place in range(PLACES):
        (root / f"{place}.png").write_bytes(encode(board(place), "PNG"))
    draw, rows = np.random.default_rng(1), []
    for episode in range(3):
        place = int(draw.integers(PLACES))
        for step in range(40):
            action = int(draw.integers(-3, 4))
            after = (place + action) % PLACES
            ends = {"source": f"{place}.png", "target": f"{after}.png"}
            rows.append({**ends, "action": [action], "episode": episode, "step": step})
            place = after
    actions = {"kind": "continuous", "names": ["steps"], "low": [-3], "high": [3]}
    return write_lines(root / "manifest.jsonl", {"schema": "iwm-fast-triplets/1", "actions": actions}, *rows)


def config_of(game) -> Config:
    tree = tiny_config(normalize_target=False).model_dump(mode="json")
    actions = {"groups": ["external"], "external": read_triplets(game).actions.model_dump(mode="json")}
    return Config.model_validate({**tree, "actions": actions, "data": {"device": "cpu", "threads": 1}})


class RingOracle(Pixels):
    """Predicts the board with its dot moved by the given action."""

    def predict(self, z, action):
        places = z[:, :, 0].argmax(dim=1) + (action[:, 0] * 3).round().long()
        return torch.stack([torch.from_numpy(board(int(place) % PLACES)).flatten(0, 1).float() for place in places])


class Deaf(RingOracle):
    def predict(self, z, action):  # noqa: ARG002  (the model's signature)
        return z


class Blind(RingOracle):
    """Represents all pictures alike."""

    def encode(self, images, which="context"):  # noqa: ARG002  (the model's signature)
        return torch.ones(len(images), SIDE * SIDE, 3)

    def predict(self, z, action):
        return z + action[:, None]


def ranked(game, model, bank=32):
    config = config_of(game)
    frames = draw_next_frames(FrameReader(read_triplets(game), config.model.image, config.data), bank)
    found, distances = rank_next_frames(model, frames, normalize=False, chunk=5)
    return frames, summarise_next_frames(frames, found), distances


def test_the_bank_holds_distinct_next_frames_and_the_queries_are_distinct(game):
    frames, results, distances = ranked(game, RingOracle(), bank=256)
    reached = {row["target"] for row in map(json.loads, game.read_text().splitlines()[1:])}
    played = {(row["source"], *row["action"]) for row in map(json.loads, game.read_text().splitlines()[1:])}
    assert len(frames.bank) == len(reached) == results["mrr_bank"]  # smaller than requested
    assert len(frames) == len(played) == results["mrr_images"]
    assert len({picture.numpy().tobytes() for picture in frames.bank}) == len(frames.bank)
    assert distances["model"].shape == (len(frames), len(frames.bank))
    triplets = read_triplets(game)
    for i, row in enumerate(frames.rows):
        place = int(Path(triplets.frames.name(int(triplets.source[row]))).stem)
        np.testing.assert_array_equal(frames.source[i, 0].numpy(), board(place))
        np.testing.assert_array_equal(
            frames.bank[frames.truth[i]].numpy(), board((place + int(triplets.values[row, 0])) % PLACES)
        )


def test_a_smaller_bank_is_a_part_of_a_larger_one_and_the_same_each_time(game):
    reader = FrameReader(read_triplets(game), config_of(game).model.image, config_of(game).data)
    small, large = draw_next_frames(reader, 8), draw_next_frames(reader, 20)
    assert len(small) == len(small.bank) == 8
    assert {p.numpy().tobytes() for p in small.bank} <= {p.numpy().tobytes() for p in large.bank}
    assert draw_next_frames(reader, 8).rows.tolist() == small.rows.tolist()
    assert draw_next_frames(reader, 8, seed=1).rows.tolist() != small.rows.tolist()


def test_an_oracle_scores_one_only_given_the_true_action(game):
    frames, results, _ = ranked(game, RingOracle())
    assert results["mrr"] == 1
    same = (frames.actions == shuffled_actions(frames)).all(dim=1)
    wrong = results["mrr_shuffled"] - float(same.double().mean())
    # Given another action, it predicts another board: at best the second, with all others equally far.
    assert wrong < 0.5
    assert results["mrr_shuffled_same"] == pytest.approx(float(same.double().mean()))
    assert results["mrr_gain"] == pytest.approx(1 - results["mrr_shuffled"])
    low, high = results["mrr_gain_interval"]
    assert low <= results["mrr_gain"] <= high
    assert results["mrr_chance"] == pytest.approx(chance_mrr(len(frames.bank)))


def test_a_deaf_model_gains_nothing_from_the_action(game):
    _, results, distances = ranked(game, Deaf())
    assert results["mrr"] == results["mrr_shuffled"] == results["mrr_neutral"] == results["mrr_bypass"]
    assert results["mrr_gain"] == 0
    np.testing.assert_array_equal(distances["model"], distances["bypass"])


def test_a_collapsed_model_shares_the_mean_rank(game):
    frames, results, _ = ranked(game, Blind())
    assert results["mrr"] == pytest.approx(2 / (len(frames.bank) + 1))


def test_a_real_model_is_ranked_as_a_loop_over_queries_ranks_it(game):
    """Against distances written out in float64, query by query."""
    config = config_of(game).model_copy(update={"model": tiny_config().model})
    torch.manual_seed(0)
    model = IWM(config.model, space_of(config.actions).dim).eval()
    frames = draw_next_frames(FrameReader(read_triplets(game), config.model.image, config.data), 12)
    found, _ = rank_next_frames(model, frames, normalize=True, chunk=5)
    with torch.no_grad():
        bank = model.targets(frames.bank).double()
        for query, true in enumerate(frames.truth):
            z = model.encode(frames.source[query])
            answer = model.predict(z, frames.actions[query : query + 1]).double()
            distance = (bank - answer).square().sum(dim=(1, 2)).sqrt()
            rank = 1 + int((distance < distance[true] * (1 - 1e-6)).sum())
            assert found.ranks["l2"]["model"][query, 0] == rank


def test_frames_that_cannot_be_decoded_are_left_out(game, tmp_path):
    rows = [json.loads(line) for line in game.read_text().splitlines()]
    for row in rows[1:]:
        row |= {"source": str(game.parent / row["source"]), "target": str(game.parent / row["target"])}
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows[5]["target"] = "bad.png"
    reader = FrameReader(
        read_triplets(write_lines(tmp_path / "m.jsonl", *rows)), config_of(game).model.image, config_of(game).data
    )
    frames = draw_next_frames(reader, 32)
    assert 4 not in frames.rows
    assert [Path(path).name for path in reader.bad] == ["bad.png"]
    only = write_lines(tmp_path / "n.jsonl", rows[0], rows[5])
    with pytest.raises(UserError, match=r"fewer than two distinct next frames to rank; .*bad\.png: cannot identify"):
        draw_next_frames(FrameReader(read_triplets(only), config_of(game).model.image, config_of(game).data), 32)


def test_one_call_measures_both_and_says_what_it_cannot(game):
    config = config_of(game)
    space = space_of(config.actions)
    what = ("mrr", "rollout", "knn")
    results, shown = evaluate_triplets(RingOracle(), config, space, read_triplets(game), what=what, examples=2)
    assert results["mrr"] == 1
    assert results["rollout"]["model"] == [0.0] * 8
    assert results["not_run"] == {"knn": "triplets have no classes"}
    assert [example.rank for example in shown] == [1, 1]
    assert shown[0].ranked[0].true
    triplets = read_triplets(game)
    frames = draw_next_frames(FrameReader(triplets, config.model.image, config.data), config.eval.bank)
    assert shown[0].action == {"steps": pytest.approx(float(triplets.values[frames.rows[0], 0]), abs=1e-6)}
    assert monitor_triplets(RingOracle(), config, space, game)["mrr"] == 1


def test_the_test_part_is_taken_where_there_is_one(game, tmp_path):
    config = config_of(game)
    assert open_triplets(game.parent, config).manifest == game
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "manifest.jsonl").write_text(game.read_text())
    assert open_triplets(tmp_path, config).manifest == tmp_path / "test" / "manifest.jsonl"
    with pytest.raises(UserError, match="this is no manifest of triplets"):
        open_triplets(tmp_path / "elsewhere", config)


def test_a_bank_larger_than_the_set_and_frames_left_out_are_said(game, tmp_path):
    for path in game.parent.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    config = config_of(tmp_path / game.name)
    lenient = Config(**(dict(config) | {"data": DataConfig(device="cpu", threads=1, max_bad_fraction=0.1)}))
    triplets = read_triplets(tmp_path / game.name)
    space = space_of(config.actions)
    found, _ = evaluate_triplets(RingOracle(), lenient, space, triplets, what=("mrr",), bank=1000)
    bank, queries = found["mrr_bank"], found["mrr_images"]
    assert found["reduced"]["mrr_bank"] == {
        "asked": 1000, "used": bank, "why": f"the set has {bank} distinct next frames"
    }  # fmt: skip
    assert found["reduced"]["mrr_images"]["used"] == queries
    (line, _) = reduced_lines(found["reduced"])
    assert line == f"mrr_bank: {bank} instead of 1000: the set has {bank} distinct next frames"
    assert found["left_out"]["test"]["files"] == [
        {"file": str(tmp_path / "3.png"), "reason": "cannot identify image file"}
    ]
    with pytest.raises(UserError, match=r"more than data\.max_bad_fraction \(0\.01\) allows"):
        evaluate_triplets(RingOracle(), config, space, triplets, what=("mrr",), bank=8)
