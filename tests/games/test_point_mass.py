"""The point mass: its dynamics by hand, its walls, and pictures that show where it is."""

from __future__ import annotations

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (the extra games)")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from iwm_fast.games import POINT_MASS, POINT_MASS_STEPS  # noqa: E402
from iwm_fast.games.point_mass import RADIUS, PointMassWalls  # noqa: E402


@pytest.fixture
def room():
    env = PointMassWalls(render_mode="rgb_array")
    env.reset(seed=0)
    return env


def placed(env, position, goal=(0.9, 0.9)):
    env.reset(seed=0, options={"position": position, "goal": goal})
    return env


def middle(picture):
    """Return where the point is drawn, x and y as shares of the picture: the mean of its red pixels."""
    red = np.clip(picture[..., 0].astype(float) - 124, 0, None)
    places = (np.arange(len(picture)) + 0.5) / len(picture)
    return np.array([(red * places[None, :]).sum(), (red * places[:, None]).sum()]) / red.sum()


def test_it_is_registered_and_is_an_environment():
    env = gymnasium.make(POINT_MASS, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=1)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(POINT_MASS_STEPS)]
    assert [truncated for _, truncated in ends] == [False] * (POINT_MASS_STEPS - 1) + [True]
    env.close()


def test_an_action_is_a_velocity(room):
    placed(room, (0.2, 0.2))
    seen, reward, terminated, truncated, info = room.step(np.array([0.5, -0.25], np.float32))
    np.testing.assert_allclose(seen, [0.25, 0.175, 0.9, 0.9], atol=1e-6)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"is_success": False})
    np.testing.assert_allclose(room.step(np.array([9.0, 0.0]))[0][:2], [0.35, 0.175], atol=1e-6)  # clipped to 1


def test_it_stops_at_a_wall_and_slides_along(room):
    """The wall's left side is at 0.47, so the point's middle stays below 0.41; down is free."""
    placed(room, (0.35, 0.3))
    for _ in range(4):
        seen = room.step(np.array([1.0, 0.5]))[0]
    assert 0.41 - 0.1 / 8 < seen[0] <= 0.41 + 1e-6
    assert seen[1] == pytest.approx(0.5, abs=1e-6)


def test_no_wall_is_crossed_and_the_way_round_is_free(room):
    placed(room, (0.35, 0.3), goal=(0.65, 0.3))
    draw = np.random.default_rng(0)
    for _ in range(300):
        x, y = room.step(draw.uniform(-1, 1, 2))[0][:2]
        assert RADIUS <= min(x, y) <= max(x, y) <= 1 - RADIUS
        assert not (0.47 - RADIUS < x < 0.53 + RADIUS and y < 0.6 + RADIUS)
    placed(room, (0.35, 0.3), goal=(0.65, 0.3))
    way = [(0, 1)] * 4 + [(1, 0)] * 3 + [(0, -1)] * 4
    ends = [room.step(np.array(move, np.float32))[1:3] for move in way]
    assert ends[-1] == (1.0, True)
    assert all(end == (0.0, False) for end in ends[:-1])


def test_the_picture_shows_where_it_is_and_the_goal_picture_where_it_is_to_be(room):
    for place in ((0.2, 0.3), (0.203, 0.3), (0.8, 0.77)):
        placed(room, place, goal=(0.75, 0.2))
        np.testing.assert_allclose(middle(room.render()), place, atol=2e-3)
        np.testing.assert_allclose(middle(room.goal_picture()), (0.75, 0.2), atol=2e-3)
    placed(room, (0.75, 0.2))
    there = room.render()
    assert np.array_equal(there, placed(room, (0.2, 0.3), goal=(0.75, 0.2)).goal_picture())
    assert (there.shape, there.dtype) == ((64, 64, 3), np.uint8)


def test_start_and_goal_are_apart_free_and_of_the_seed(room):
    starts = [room.reset(seed=seed)[0] for seed in range(50)]
    assert min(np.linalg.norm(s[:2] - s[2:]) for s in starts) >= 0.4
    assert len({tuple(s) for s in starts}) == 50
    for seed in (3, 7):
        assert np.array_equal(room.reset(seed=seed)[0], starts[seed])


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"walls": [[0.5, 0, 0.4, 1]]}, "each must be left, top, right, bottom"),
        ({"walls": [[0, 0, 1, 1]]}, "no free place was found"),
        ({"speed": 0}, "speed, reach, apart and size"),
    ],
    ids=["reversed", "full", "still"],
)
def test_a_room_that_cannot_be_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        PointMassWalls(**told).reset(seed=0)


def test_a_place_within_a_wall_is_refused(room):
    with pytest.raises(ValueError, match=r"position is .* it must be a free place"):
        placed(room, (0.5, 0.2))
