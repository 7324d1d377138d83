"""Manifests of triplets: how they are read, and the one-line error of each mistake."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_triplets import HEADER, rows_of_manifest, write_game, write_lines
from small_run import small_config

from iwm_fast.actions.external import ExternalSpace, space_of
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import ActionsConfig, ExternalActions
from iwm_fast.data.triplets import find_manifest, read_triplets, resolve_triplets
from iwm_fast.errors import UserError

ROW = {"source": "a.png", "target": "b.png", "action": [0.5, 1.0]}
STATED = {**ROW, "source_state": [0, 1], "target_state": [2.5, 3]}
CHOICE = {"source": "a.png", "target": "b.png", "action": 2}
CHOICES = {"schema": HEADER["schema"], "actions": {"kind": "discrete", "names": ["left", "stay", "right"]}}


def header(**changes):
    return {**HEADER, "actions": {**HEADER["actions"], **changes}}


def test_rows_files_and_actions_are_those_of_the_manifest(tmp_path):
    manifest = write_game(tmp_path, episodes=2, steps=3)
    triplets, rows = read_triplets(manifest), rows_of_manifest(manifest)
    assert len(triplets) == len(rows) == 6
    names = [triplets.frames.name(i) for i in range(len(triplets.frames))]
    assert len(set(names)) == len(names) == 8  # a frame between two triplets is one file
    for i, row in enumerate(rows):
        assert names[triplets.source[i]] == str(tmp_path / row["source"])
        assert names[triplets.target[i]] == str(tmp_path / row["target"])
    assert triplets.values.tolist() == [row["action"] for row in rows]
    assert triplets.episode.tolist() == [0, 0, 0, 1, 1, 1]
    assert triplets.step.tolist() == [0, 1, 2, 0, 1, 2]
    assert triplets.states is None
    # By hand: neutral 0, divided by the farther end of the range.
    want = np.array([[row["action"][0] / 2, row["action"][1] / 4] for row in rows])
    np.testing.assert_allclose(triplets.vectors(), want, rtol=1e-6)


def test_states_are_those_of_the_frames(tmp_path):
    rows = [STATED, {**ROW, "source": "b.png", "target": "c.png", "source_state": [2.5, 3], "target_state": [4, 5]}]
    triplets = read_triplets(write_lines(tmp_path / "m.jsonl", *rows))
    names = [triplets.frames.name(place).rsplit("/", 1)[1] for place in range(3)]
    assert dict(zip(names, triplets.states.tolist(), strict=True)) == {
        "a.png": [0, 1], "b.png": [2.5, 3], "c.png": [4, 5],
    }  # fmt: skip


def test_without_a_header_choices_and_ranges_are_those_found(tmp_path):
    choices = read_triplets(write_lines(tmp_path / "a.jsonl", CHOICE, {**CHOICE, "action": 0}, ""))
    assert choices.actions == ExternalActions(kind="discrete", names=("0", "1", "2"))
    assert choices.vectors().tolist() == [[0, 0, 1], [1, 0, 0]]
    assert choices.episode is None
    box = read_triplets(write_lines(tmp_path / "b.jsonl", ROW, {**ROW, "action": [-1, 3]}))
    assert box.actions.names == ("action_0", "action_1")
    assert (box.actions.low, box.actions.high, box.actions.neutral) == ((-1, 1), (0.5, 3), (0, 2))
    assert box.vectors().tolist() == [[0.5, -1], [-1, 1]]


def test_a_header_beside_is_one_and_a_count_names_the_choices(tmp_path):
    manifest = write_lines(tmp_path / "m.jsonl", CHOICE)
    beside = {"schema": HEADER["schema"], "actions": {"kind": "discrete", "count": 4}}
    (tmp_path / "m.actions.json").write_text(json.dumps(beside))
    assert read_triplets(manifest).actions.names == ("0", "1", "2", "3")
    write_lines(manifest, CHOICES, CHOICE)
    with pytest.raises(UserError, match=r"m\.jsonl:1: a header, and m\.actions\.json beside it is another"):
        read_triplets(manifest)


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
def test_parquet_is_read_as_the_same_lines(tmp_path, discrete):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    manifest = write_game(tmp_path, discrete=discrete)
    rows = [
        {**row, "source_state": [row["step"], 0.5], "target_state": [row["step"] + 1, 0.5]}
        for row in rows_of_manifest(manifest)
    ]
    write_lines(manifest, manifest.read_text().splitlines()[0], *rows)
    (tmp_path / "other.actions.json").write_text(manifest.read_text().splitlines()[0])
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "other.parquet")
    lines, table = read_triplets(manifest), read_triplets(tmp_path / "other.parquet")
    assert table.actions == lines.actions
    assert [table.frames.name(i) for i in range(28)] == [lines.frames.name(i) for i in range(28)]
    for name in ("source", "target", "values", "episode", "step", "states"):
        np.testing.assert_array_equal(getattr(table, name), getattr(lines, name))
    parquet.write_table(pyarrow.Table.from_pylist([*rows[:2], {**rows[2], "source": None}]), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet:3: source is missing"):
        read_triplets(tmp_path / "other.parquet")
    (tmp_path / "other.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"other\.parquet: cannot be read as Parquet"):
        read_triplets(tmp_path / "other.parquet")


def test_parquet_without_pyarrow_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "m.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"m\.parquet: Parquet is read by pyarrow: pip install 'iwm-fast\[parquet\]'"):
        read_triplets(tmp_path / "m.parquet")


MISTAKES = {
    "no line": ([], "m.jsonl: holds no triplet; give one per line: {source, target, action}"),
    "header alone": ([HEADER], "m.jsonl: holds no triplet; give one per line: {source, target, action}"),
    "not JSON": ([ROW, "{"], "m.jsonl:2: not JSON: Expecting property name enclosed in double quotes: line 2 column 1"),
    "no object": ([ROW, "[1]"], "m.jsonl:2: found [1]; allowed: one object per line"),
    "unknown key": (
        [ROW, {**ROW, "reward": 1}],
        "m.jsonl:2: unknown key 'reward'; allowed: source, target, action, episode, step, source_state, target_state",
    ),
    "missing": (
        [ROW, {"source": "a.png", "action": [1, 2]}],
        "m.jsonl:2: target is missing; a triplet has source, target and action",
    ),
    "no path": (
        [HEADER, ROW, {**ROW, "target": 3}],
        "m.jsonl:3: target: found 3; allowed: the path of a picture, relative to the manifest",
    ),
    "no action": (
        [{**ROW, "action": "left"}],
        'm.jsonl:1: action: found "left"; allowed: a list of numbers, or a whole number for one choice of several',
    ),
    "other length": (
        [ROW, {**ROW, "action": [1]}],
        "m.jsonl:2: action: found [1]; allowed: a list of 2 numbers, as in line 1",
    ),
    "not a number": (
        [ROW, {**ROW, "action": [1, "x"]}],
        'm.jsonl:2: action: found [1, "x"]; allowed: a list of 2 numbers, as in line 1',
    ),
    "not finite": (
        [ROW, '{"source": "a", "target": "b", "action": [1, NaN]}'],
        "m.jsonl:2: action: found [1, NaN]; allowed: a list of 2 numbers, as in line 1",
    ),
    "a flag": (
        [ROW, {**ROW, "action": [True, 1]}],
        "m.jsonl:2: action: found [true, 1]; allowed: a list of 2 numbers, as in line 1",
    ),
    "choice and list": (
        [CHOICE, ROW],
        "m.jsonl:2: action: found [0.5, 1.0]; allowed: a whole number from 0 to 4095, one choice of several",
    ),
    "choice below": (
        [CHOICE, {**CHOICE, "action": -1}],
        "m.jsonl:2: action: found -1; allowed: a whole number from 0 to 4095, one choice of several",
    ),
    "choice that there is not": (
        [CHOICES, CHOICE, {**CHOICE, "action": 3}],
        "m.jsonl:3: action: found 3; allowed: a whole number from 0 to 2 (left, stay, right)",
    ),
    "out of range": (
        [HEADER, ROW, {**ROW, "action": [1.5, 1]}],
        "m.jsonl:3: action: found [1.5, 1]; allowed: numbers from [-2.0, 0.0] to [1.0, 4.0], as the header says",
    ),
    "episode in some": ([ROW, {**ROW, "episode": 1}], "m.jsonl:2: episode must stand in every line or in none"),
    "episode": ([{**ROW, "episode": 1.5}], "m.jsonl:1: episode: found 1.5; allowed: a whole number or a text"),
    "step": ([{**ROW, "step": "1"}], 'm.jsonl:1: step: found "1"; allowed: a whole number'),
    "state in some": (
        [STATED, ROW],
        "m.jsonl:2: source_state must stand in every line or in none",
    ),
    "one state": (
        [{**ROW, "source_state": [1]}],
        "m.jsonl:1: source_state and target_state must stand together, or neither",
    ),
    "state of another length": (
        [STATED, {**STATED, "target_state": [1]}],
        "m.jsonl:2: target_state: found [1]; allowed: a list of 2 numbers, as in line 1",
    ),
    "state": (
        [{**STATED, "source_state": "left"}],
        'm.jsonl:1: source_state: found "left"; allowed: a list of numbers',
    ),
    "two states of a frame": (
        [STATED, {**STATED, "target": "c.png", "source_state": [0, 9]}],
        "m.jsonl:2: source_state: a.png has another state in an earlier row",
    ),
    "another schema": (
        [{**HEADER, "schema": "mine"}, ROW],
        "m.jsonl:1: schema: found 'mine'; allowed: 'iwm-fast-triplets/1'",
    ),
    "header's key": (
        [header(unit="N"), ROW],
        "m.jsonl:1: actions: unknown key 'unit'; allowed: kind, count, names, low, high, neutral",
    ),
    "header's kind": (
        [header(kind="both"), ROW],
        "m.jsonl:1: actions: kind: Input should be 'continuous' or 'discrete'",
    ),
    "header's ranges": ([header(low=[-2]), ROW], "m.jsonl:1: actions: low has 1 numbers; continuous actions need 2"),
    "header's order": (
        [header(low=[2, 0], neutral=[1, 1]), ROW],
        "m.jsonl:1: actions: low, neutral and high must ascend in each component",
    ),
    "header of another kind": (
        [CHOICES, ROW],
        "m.jsonl: its actions are continuous, and its header says discrete ones",
    ),
    "header of another size": (
        [HEADER, {**ROW, "action": [1]}],
        "m.jsonl: its actions have 1 components, and its header says 2 (push, turn)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_with_the_file_the_line_and_what_is_allowed(tmp_path, name):
    rows, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        read_triplets(write_lines(tmp_path / "m.jsonl", *rows))
    line = str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in line
    assert line.split(" (char", 1)[0] == message


def test_what_a_run_was_trained_on_is_what_another_manifest_has_to_be(tmp_path):
    known = read_triplets(write_lines(tmp_path / "a.jsonl", HEADER, ROW)).actions
    beyond = read_triplets(write_lines(tmp_path / "b.jsonl", {**ROW, "action": [5, 8]}), known)
    assert beyond.actions == known
    assert beyond.vectors().tolist() == [[2.5, 2]]  # encoded on the run's scale, not on the manifest's
    for row, why in (
        (CHOICE, "its actions are discrete, and the run was trained on continuous ones"),
        ({**ROW, "action": [1, 2, 3]}, r"its actions have 3 components, and the run was trained on 2 \(push, turn\)"),
    ):
        with pytest.raises(UserError, match=why):
            read_triplets(write_lines(tmp_path / "c.jsonl", row), known)
    with pytest.raises(UserError, match="its actions are turn, push, and the run was trained on push, turn"):
        read_triplets(write_lines(tmp_path / "d.jsonl", header(names=["turn", "push"]), ROW), known)


def test_a_manifest_is_found_and_has_to_agree_with_the_configuration(tmp_path):
    manifest = write_game(tmp_path / "game")
    for root in (manifest, manifest.parent):
        assert find_manifest(root) == manifest
        config, triplets = resolve_triplets(small_config(root, actions__groups=["external"]))
        assert len(triplets) == 24
        assert config.actions.external.names == ("push", "turn")
    assert resolve_triplets(small_config(tmp_path))[1] is None
    with pytest.raises(UserError, match=r"set actions\.groups=\[external\], or data\.source=folder"):
        resolve_triplets(small_config(manifest))
    with pytest.raises(UserError, match="is no manifest of triplets: give a "):
        resolve_triplets(small_config(tmp_path, actions__groups=["external"]))
    (manifest.parent / "manifest.parquet").touch()
    with pytest.raises(UserError, match=r"holds manifest\.jsonl and manifest\.parquet"):
        find_manifest(manifest.parent)


numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(st.tuples(numbers, numbers, numbers).map(sorted), min_size=1, max_size=4), st.data())
def test_continuous_values_lie_within_one_of_neutral_and_decode_to_themselves(ranges, data):
    low, neutral, high = zip(*ranges, strict=True)
    names = tuple(f"n{i}" for i in range(len(ranges)))
    space = ExternalSpace(ExternalActions(kind="continuous", names=names, low=low, high=high, neutral=neutral))
    values = np.array([[data.draw(st.floats(a, b)) for a, b in zip(low, high, strict=True)]])
    encoded = space.encode_values(values)
    assert encoded.dtype == np.float32
    assert (np.abs(encoded) <= 1 + 1e-6).all()
    assert not space.encode_values(np.array([neutral])).any()
    decoded = space.decode(encoded)
    for place, name in enumerate(names):
        # float32 has 2**-24 of a value of at most one, times the range
        assert decoded[name][0] == pytest.approx(values[0, place], abs=2.0**-23 * max(high[place] - low[place], 1e-9))
    named = {name: float(values[0, place]) for place, name in enumerate(names)}
    np.testing.assert_array_equal(space.vector(named), encoded[0])


def test_choices_are_encoded_one_hot_and_no_choice_is_zero():
    space = space_of(
        ActionsConfig(groups=("external",), external=ExternalActions(kind="discrete", names=("left", "right")))
    )
    assert space.encode_values(np.array([1, 0])).tolist() == [[0, 1], [1, 0]]
    assert {name: flag.tolist() for name, flag in space.decode(np.array([[0, 1], [0, 0]])).items()} == {
        "left": [False, False],
        "right": [True, False],
    }
    assert space.vector({"right": 1}).tolist() == [0, 1]
    for wrong in ([2], [-1]):
        with pytest.raises(ValueError, match="choices from 0 to 1"):
            space.encode_values(np.array(wrong))
    with pytest.raises(ValueError, match="'up' is no component"):
        space.vector({"up": 1})
    assert type(space_of(ActionsConfig())) is ActionSpace
    with pytest.raises(UserError, match=r"actions\.external is not set"):
        space_of(ActionsConfig(groups=("external",)))
