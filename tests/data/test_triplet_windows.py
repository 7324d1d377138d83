"""The frames before each triplet, and manifests that do not tell them."""

from __future__ import annotations

import numpy as np
import pytest
from made_triplets import write_game, write_lines
from small_run import small_config

from iwm_fast.data.triplet_windows import continuations, windows
from iwm_fast.data.triplets import read_triplets, resolve_triplets
from iwm_fast.errors import UserError


def row(source, target, **more):
    return {"source": source, "target": target, "action": 0, **more}


def names_of(triplets, history):
    return [["".join(triplets.frames.name(f))[-1] for f in one] for one in windows(triplets, history).tolist()]


def test_a_window_holds_the_frames_before_in_its_episode_and_repeats_the_first(tmp_path):
    rows = [row("c", "d", episode=0, step=2), row("a", "b", episode=0, step=0), row("b", "c", episode=0, step=1)]
    rows += [row("e", "f", episode=1, step=0), row("f", "g", episode=1, step=1)]  # the rows' order does not matter
    triplets = read_triplets(write_lines(tmp_path / "m.jsonl", *rows))
    assert names_of(triplets, 1) == [["c"], ["a"], ["b"], ["e"], ["f"]]
    assert names_of(triplets, 3) == [list("abc"), list("aaa"), list("aab"), list("eee"), list("eef")]
    assert windows(triplets, 4).shape == (5, 4)


def test_where_several_triplets_could_be_the_one_before_none_is(tmp_path):
    rows = [row("a", "c", episode=0), row("b", "c", episode=0), row("c", "d", episode=0)]
    assert names_of(read_triplets(write_lines(tmp_path / "m.jsonl", *rows)), 2)[2] == ["c", "c"]


def test_a_step_that_is_missing_begins_a_window_anew(tmp_path):
    rows = [row("a", "b", episode=0, step=0), row("b", "c", episode=0, step=2)]
    assert names_of(read_triplets(write_lines(tmp_path / "m.jsonl", *rows)), 2)[1] == ["b", "b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", "b", step=0), row("b", "c", step=1)], "its rows have no episode, and model.history is 2: give each"),
        (
            [row("a", "b", episode=0), row("c", "d", episode=0)],
            "no row's source is the target of the row before it in its episode, and model.history is 2",
        ),
    ],
    ids=["no episodes", "files of their own"],
)
def test_a_manifest_that_does_not_tell_the_frames_before_is_one_line(tmp_path, rows, message):
    manifest = write_lines(tmp_path / "m.jsonl", *rows)
    config = small_config(manifest, actions__groups=["external"], model__history=2)
    with pytest.raises(UserError, match=message) as caught:
        resolve_triplets(config)
    assert "\n" not in str(caught.value)
    resolve_triplets(small_config(manifest, actions__groups=["external"]))


def test_a_triplet_goes_on_to_the_end_of_its_episode(tmp_path):
    triplets = read_triplets(write_game(tmp_path, episodes=2, steps=3))
    assert continuations(triplets, 1).tolist() == [[0], [1], [2], [3], [4], [5]]
    wanted = [[0, 1, 2, -1], [1, 2, -1, -1], [2, -1, -1, -1], [3, 4, 5, -1], [4, 5, -1, -1], [5, -1, -1, -1]]
    assert continuations(triplets, 4).tolist() == wanted


def test_several_steps_need_episodes_too(tmp_path):
    manifest = write_lines(tmp_path / "m.jsonl", row("a", "b"), row("b", "c"))
    with pytest.raises(UserError, match=r"its rows have no episode, and train\.horizon is 3: .* set train\.horizon=1"):
        resolve_triplets(small_config(manifest, actions__groups=["external"], train__horizon=3))


def test_windows_of_a_recorded_game_are_its_frames_in_order(tmp_path):
    triplets = read_triplets(write_game(tmp_path, episodes=2, steps=5))
    found = windows(triplets, 3)
    np.testing.assert_array_equal(found[:, -1], triplets.source)
    inside = np.flatnonzero(triplets.step >= 2)
    np.testing.assert_array_equal(found[inside, 0], triplets.source[inside - 2])
