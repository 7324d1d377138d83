"""Recordings of games: files replayed in a fresh environment, equal for a seed, and never half-written."""

from __future__ import annotations

import filecmp
import itertools
import json
import os

import numpy as np
import pytest
from made_triplets import rows_of_manifest
from PIL import Image
from typer.testing import CliRunner

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (the extra record_gym)")
pytest.importorskip("pygame", reason="pygame is not installed (the extra record_gym)")

from iwm_fast.cli.main import app, main  # noqa: E402
from iwm_fast.data.randomness import uniforms  # noqa: E402
from iwm_fast.data.tools import record_gym  # noqa: E402
from iwm_fast.data.tools.record_gym import Recording, record  # noqa: E402
from iwm_fast.data.triplets import read_triplets  # noqa: E402
from iwm_fast.errors import UserError  # noqa: E402

LAKE = {"map_name": "4x4", "is_slippery": False}
DISCRETE = Recording("FrozenLake-v1", train=12, test=3, size=32, seed=4, episode_steps=5, arguments=LAKE)
CONTINUOUS = Recording("Pendulum-v1", train=5, test=0, size=32, seed=4, repeat=2, episode_steps=3, motion=True)


@pytest.fixture(scope="module", autouse=True)
def no_display():
    os.environ["SDL_VIDEODRIVER"] = "dummy"


def replay(recording, rows, folder):
    """Play a manifest's actions in a new environment and compare its frames with the files."""
    env = gymnasium.make(recording.env, render_mode="rgb_array", **(recording.arguments or {}))
    checked = 0
    for row in rows:
        if row["step"] == 0:
            seed = int(uniforms(recording.seed, row["episode"], 0, record_gym._PLAYER, 1)[0, 0] * 2**31)
            seen, _ = env.reset(seed=seed)
            drawn = [shown(env, recording)] * 3
        assert stored(folder / row["source"]) == joined(recording, drawn)
        assert row["source_state"] == numbers(env, seen)
        action = row["action"] if isinstance(row["action"], int) else np.array(row["action"], np.float32)
        for _ in range(recording.repeat):
            seen = env.step(action)[0]
            drawn = [*drawn[1:], shown(env, recording)]
        assert stored(folder / row["target"]) == joined(recording, drawn)
        assert row["target_state"] == numbers(env, seen)
        checked += 1
    env.close()
    return checked


def numbers(env, seen):
    """An observation as a list: choices one-hot."""
    if isinstance(seen, np.ndarray):
        return seen.tolist()
    return [float(choice == seen) for choice in range(env.observation_space.n)]


def shown(env, recording):
    return Image.fromarray(env.render()).resize((recording.size,) * 2, Image.Resampling.BOX)


def stored(path):
    return np.asarray(Image.open(path)).tolist()


def joined(recording, drawn):
    if not recording.motion:
        return np.asarray(drawn[-1]).tolist()
    return np.stack([np.asarray(one.convert("L")) for one in drawn], axis=2).tolist()


def test_a_discrete_game_is_what_its_actions_lead_to(tmp_path):
    actions = record(DISCRETE, tmp_path / "lake")
    assert (actions.kind, actions.names) == ("discrete", ("0", "1", "2", "3"))
    train = read_triplets(tmp_path / "lake" / "train" / "manifest.jsonl")
    rows = rows_of_manifest(train.manifest)
    assert replay(DISCRETE, rows, train.manifest.parent) == 12
    assert max(row["step"] for row in rows) == 4  # cut after five
    test = rows_of_manifest(tmp_path / "lake" / "test" / "manifest.jsonl")
    assert len(test) == 3
    assert not {row["episode"] for row in rows} & {row["episode"] for row in test}
    assert len({row["action"] for row in rows}) > 2


def test_a_continuous_game_is_what_its_actions_lead_to_and_its_channels_show_motion(tmp_path):
    actions = record(CONTINUOUS, tmp_path / "pendulum")
    assert (actions.kind, actions.low, actions.high, actions.neutral) == ("continuous", (-2.0,), (2.0,), (0.0,))
    folder = tmp_path / "pendulum" / "train"
    rows = rows_of_manifest(folder / "manifest.jsonl")
    assert replay(CONTINUOUS, rows, folder) == 5
    assert len({row["action"][0] for row in rows}) == 5
    moving = np.asarray(Image.open(folder / rows[1]["target"]))
    assert (moving[..., 0] != moving[..., 2]).any()
    assert not (tmp_path / "pendulum" / "test").exists()


def test_what_stays_as_it_is_becomes_grey_and_only_that(tmp_path):
    """Against the plain recording of the same seed: the difference from one fixed picture, clipped."""
    record(Recording(**{**vars(DISCRETE), "still": True}), tmp_path / "still")
    record(DISCRETE, tmp_path / "plain")
    rows = rows_of_manifest(tmp_path / "plain" / "train" / "manifest.jsonl")
    assert rows == rows_of_manifest(tmp_path / "still" / "train" / "manifest.jsonl")
    backgrounds = []
    for row in rows:
        plain, still = (
            np.asarray(Image.open(tmp_path / name / "train" / row["target"])).astype(int) for name in ("plain", "still")
        )
        assert (still == 124).all(axis=2).mean() > 0.8  # the lake, except the walker
        backgrounds.append(np.where((still > 0) & (still < 255), plain - still + 124, -1))
    known = np.stack(backgrounds)
    assert (np.where(known >= 0, known, known.max(axis=0)) == known.max(axis=0)).all()


@pytest.mark.parametrize("left", [0.0, 0.45])
def test_pictures_that_show_nothing_are_counted(tmp_path, capsys, left):
    """The car begins at 0.33 to 0.44 of the drawing's width."""
    car = Recording(
        "MountainCarContinuous-v0", train=20, test=0, size=32, repeat=8, episode_steps=4, motion=True, still=True,
        crop=(left, 0.0, 1.0, 1.0),
    )  # fmt: skip
    record(car, tmp_path / "car")
    pictures = [stored(path) for path in (tmp_path / "car" / "train" / "frames").iterdir()]
    empty = sum(int(np.ptp(picture) <= 6) for picture in pictures)
    assert (empty > 0) == (left > 0)
    said = capsys.readouterr().err
    assert (f"train: {empty} of {len(pictures)} pictures show nothing that moves" in said) == (empty > 0)


def test_an_absorbing_end_stays_as_it_is_and_a_truncated_episode_has_none(tmp_path):
    """Beside the plain recording of the same seed: one more row per episode that the environment ended."""
    episodes = {}
    for absorbing in (False, True):
        out = tmp_path / str(absorbing)
        record(Recording(**{**vars(DISCRETE), "train": 60, "absorbing": absorbing}), out)
        for row in rows_of_manifest(out / "train" / "manifest.jsonl"):
            episodes.setdefault(absorbing, {}).setdefault(row["episode"], []).append(row)
    ends = np.isin(gymnasium.make("FrozenLake-v1", **LAKE).unwrapped.desc.reshape(-1), [b"H", b"G"])
    ended = 0
    last = max(episodes[True])  # cut by the number of triplets
    for episode in set(episodes[True]) - {last}:
        plain, absorbed = episodes[False][episode], episodes[True][episode]
        assert absorbed[: len(plain)] == plain
        over = ends[np.argmax(plain[-1]["target_state"])]
        assert len(absorbed) == len(plain) + over
        if over:
            ended += 1
            row = absorbed[-1]
            assert (row["source"], row["source_state"]) == (plain[-1]["target"], row["target_state"])
            pictures = [stored(tmp_path / "True" / "train" / row[name]) for name in ("source", "target")]
            assert pictures[0] == pictures[1]
    assert 3 < ended < last - min(episodes[True])


def test_an_absorbing_end_within_an_action_is_at_rest(tmp_path):
    """The car passes the flag in the middle of 16 steps: its picture is that of the car at rest where it ended."""
    car = Recording(
        "MountainCarContinuous-v0", train=30, test=0, size=32, repeat=16, motion=True, episode_steps=4,
        reset={"low": 0.42, "high": 0.44}, absorbing=True,
    )  # fmt: skip
    record(car, tmp_path / "car")
    rows = rows_of_manifest(tmp_path / "car" / "train" / "manifest.jsonl")
    at_flag = [row for row in rows if row["target_state"][0] >= 0.45]
    assert len(at_flag) >= 4
    for row in at_flag:
        picture = np.asarray(Image.open(tmp_path / "car" / "train" / row["target"]))
        assert (picture[..., 0] == picture[..., 2]).all()
    record(Recording(**{**vars(car), "absorbing": False}), tmp_path / "left_out")
    rows = rows_of_manifest(tmp_path / "left_out" / "train" / "manifest.jsonl")
    assert max(row["target_state"][0] for row in rows) < 0.45


def test_the_same_seed_gives_the_same_files_and_another_others(tmp_path):
    for name in ("a", "b"):
        record(DISCRETE, tmp_path / name)
    files = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file())
    match, mismatch, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert (sorted(match), mismatch, errors) == (files, [], [])
    record(Recording(**{**vars(DISCRETE), "seed": 5}), tmp_path / "c")
    manifests = [(tmp_path / name / "train" / "manifest.jsonl").read_text() for name in "ac"]
    assert manifests[0] != manifests[1]


def test_a_recording_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_gym, "write_manifest", fail)
    with pytest.raises(UserError, match="No space left on device; choose another --out"):
        record(DISCRETE, tmp_path / "lake")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["NoSuchGame-v0"], "NoSuchGame-v0: gymnasium cannot make it: Environment `NoSuchGame` doesn't exist"),
        (["Taxi-v4", "--env-argument", "speed=3"], "Taxi-v4: gymnasium cannot make it: "),
        (["Taxi-v4", "--env-argument", "speed"], "--env-argument speed: give KEY=VALUE, such as is_slippery=false"),
        (["Taxi-v4", "--names", "up,down"], "--names: up, down: give 6 different names"),
    ],
    ids=["no such game", "no such argument", "no value", "names"],
)
def test_what_cannot_be_recorded_is_one_line(tmp_path, capsys, words, line):
    assert main(["data", "record", *words, "--out", str(tmp_path / "out"), "--frames", "2"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert line in said
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        record(DISCRETE, tmp_path)


def test_the_command_records_under_the_names_that_it_is_given(tmp_path):
    out = tmp_path / "lake"
    words = ["data", "record", "FrozenLake-v1", "--out", str(out), "--frames", "3", "--test", "1", "--size", "16"]
    done = CliRunner().invoke(app, [*words, "--names", "left,down,right,up", "--env-argument", "is_slippery=false"])
    assert done.exit_code == 0, done.output
    assert "an action is one of 4" in done.output
    header = json.loads((out / "train" / "manifest.jsonl").read_text().splitlines()[0])
    assert header["actions"] == {"kind": "discrete", "names": ["left", "down", "right", "up"]}
    assert Image.open(out / "test" / rows_of_manifest(out / "test" / "manifest.jsonl")[0]["target"]).size == (16, 16)


NUMBERS = itertools.count()


class Pictures(gymnasium.Env):
    """Observes what it draws, or numbers that are not finite."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode=None, numbers=False, end=4):
        self.render_mode, self.numbers, self.end = render_mode, numbers, end
        box = gymnasium.spaces.Box
        self.observation_space = box(-np.inf, np.inf, (2,)) if numbers else box(0, 255, (16, 16, 3), np.uint8)

    def render(self):
        return np.full((16, 16, 3), self.count % 256, np.uint8)

    def _seen(self):
        return np.array([self.count, np.inf if self.count == 2 else 0.0]) if self.numbers else self.render()

    def reset(self, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.count = 0
        return self._seen(), {}

    def step(self, action):
        assert action in (0, 1)
        self.count += 1
        return self._seen(), 0.0, self.count == self.end, False, {}


@pytest.fixture
def name():
    name = f"Pictures{next(NUMBERS)}-v0"  # its own, because a line about an environment is said once
    gymnasium.register(name, entry_point=Pictures)
    yield name
    del gymnasium.registry[name]


def test_episodes_that_end_before_a_second_picture_end_the_recording_in_one_line(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: 100 episodes .* before a second picture, .* lower --action-repeat"):
        record(Recording(name, train=6, test=0, size=16, repeat=20, motion=True), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_each_picture_belongs_to_a_triplet_also_where_episodes_end_at_once(tmp_path):
    short = Recording("FrozenLake-v1", train=12, test=0, size=16, seed=4, repeat=4, motion=True, arguments=LAKE)
    record(short, tmp_path / "out")
    rows = rows_of_manifest(tmp_path / "out" / "train" / "manifest.jsonl")
    assert {row["episode"] for row in rows} == {1, 2, 3}  # the first gave none
    named = {row[end] for row in rows for end in ("source", "target")}
    assert {f"frames/{path.name}" for path in (tmp_path / "out" / "train" / "frames").iterdir()} == named


def test_an_environment_that_never_ends_has_a_background_too(tmp_path, name):
    record(Recording(name, train=6, test=0, size=16, still=True, arguments={"end": None}), tmp_path / "out")
    assert len(read_triplets(tmp_path / "out" / "train" / "manifest.jsonl")) == 6


@pytest.mark.parametrize("numbers", [False, True], ids=["pictures", "infinite"])
def test_observations_that_are_no_finite_numbers_are_left_out_and_said(tmp_path, capsys, numbers, name):
    record(Recording(name, train=6, test=0, size=16, arguments={"numbers": numbers}), tmp_path / "out")
    assert f"{name}: no states are recorded" in capsys.readouterr().err
    triplets = read_triplets(tmp_path / "out" / "train" / "manifest.jsonl")
    assert (len(triplets), triplets.states) == (6, None)
