"""Pictures of goals are those of an episode that has reached it; success is the environment's."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from PIL import Image

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (the extra games)")
pytest.importorskip("pygame", reason="pygame is not installed (the extra games)")

from iwm_fast.errors import UserError  # noqa: E402
from iwm_fast.games.goals import auto_goal, picture_goal, succeeded  # noqa: E402
from iwm_fast.games.play import Game  # noqa: E402
from iwm_fast.games.recording import Recording, read_recording, write_recording  # noqa: E402

LAKE = Recording("FrozenLake-v1", 1, 0, size=32, arguments={"is_slippery": False})
CAR = Recording("MountainCarContinuous-v0", 1, 0, size=32, repeat=4, motion=True, crop=(0.1, 0.5, 0.7, 1.0))
ROOM = Recording("iwm_fast/PointMassWalls-v0", 1, 0, size=48)
DOWN, RIGHT = 1, 2


def test_the_lake_s_goal_is_what_a_walk_to_it_shows():
    with closing(Game(LAKE)) as game:
        game.reset(0)
        before, goal = game.picture(), auto_goal(game)
        assert np.array_equal(game.picture(), before)
        for number, action in enumerate((DOWN, DOWN, RIGHT, RIGHT, DOWN, RIGHT)):
            held = game.hold(action)
            assert held.over == (number == 5)
        assert np.array_equal(game.picture(), goal)
        assert not np.array_equal(before, goal)
        assert succeeded(game, terminated=True, last_reward=held.last_reward, info=held.info)


def test_a_hole_is_no_success():
    with closing(Game(LAKE)) as game:
        game.reset(0)
        game.hold(DOWN)
        held = game.hold(RIGHT)
        assert held.terminated
        assert not succeeded(game, terminated=True, last_reward=held.last_reward, info=held.info)


def test_the_car_s_goal_is_at_the_flag_at_rest_and_the_car_stays():
    with closing(Game(CAR)) as game:
        game.reset(0)
        state = np.array(game.env.unwrapped.state)
        goal = auto_goal(game)
        assert np.array_equal(game.env.unwrapped.state, state)
        assert (goal[..., 0] == goal[..., 2]).all()  # at rest: three equal frames
        game.env.unwrapped.state = np.array([0.45, 0.0])
        game._recent = [game.draw()] * 3
        assert np.array_equal(game.picture(), goal)
        assert succeeded(game, terminated=True, last_reward=-0.1, info={})


def test_the_point_s_goal_is_that_of_the_episode_and_is_subtracted_from_like_frames():
    background = np.full((48, 48, 3), 100, np.uint8)
    with closing(Game(ROOM, background)) as game:
        goals = []
        for seed in (0, 1):
            game.reset(seed)
            goals.append(auto_goal(game))
            game.env.unwrapped.position = game.env.unwrapped.goal
            game._recent = [game.draw()] * 3
            assert np.array_equal(game.picture(), goals[-1])
        assert not np.array_equal(*goals)


def test_a_picture_is_a_recorded_frame_or_a_rendering(tmp_path):
    with closing(Game(CAR)) as game:
        game.reset(0)
        recorded, rendering = tmp_path / "recorded.png", tmp_path / "rendering.png"
        Image.fromarray(game.picture()).save(recorded)
        Image.fromarray(game.render()).save(rendering)
        assert np.array_equal(picture_goal(game, recorded), game.picture())
        assert np.array_equal(picture_goal(game, rendering), game.picture())
        Image.new("RGB", (40, 30)).save(tmp_path / "other.png")
        (tmp_path / "no.png").write_text("no picture")
        for name, message in (
            (
                "other.png",
                "40 × 30 pixels: give a recorded frame, 32 × 32, or a rendering of MountainCar",
            ),
            ("no.png", "no.png: cannot be read as a picture"),
            ("gone.png", "gone.png: no such file"),
        ):
            with pytest.raises(UserError, match=message):
                picture_goal(game, tmp_path / name)


def test_an_environment_without_a_goal_asks_for_a_picture():
    with closing(Game(Recording("Pendulum-v1", 1, 0, size=16))) as game:
        game.reset(0)
        with pytest.raises(UserError, match="Pendulum-v1: gives no picture of its goal: give --goal PICTURE"):
            auto_goal(game)


def test_a_recording_is_read_as_it_was_written(tmp_path):
    assert read_recording(tmp_path) is None
    background = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    told = Recording(**{**vars(CAR), "still": True, "names": ("force",), "reset": {"low": -1.1}, "persistence": 0.5})
    write_recording(tmp_path, told, background)
    found, drawn = read_recording(tmp_path)
    assert (found, drawn.tolist()) == (told, background.tolist())
    for damage in ('{"schema": "iwm-fast-recording/1"', '{"schema": 1}', "[]", '{"schema": "other/1", "crop": []}'):
        (tmp_path / "recording.json").write_text(damage)
        with pytest.raises(UserError, match=r"recording\.json: cannot be read"):
            read_recording(tmp_path)


def test_options_that_the_environment_refuses_are_one_line():
    with (
        closing(Game(Recording(**{**vars(ROOM), "reset": {"position": [0.5, 0.1]}}))) as game,
        pytest.raises(UserError, match=r"cannot be reset with .*position.*it must be a free place"),
    ):
        game.reset(0)
