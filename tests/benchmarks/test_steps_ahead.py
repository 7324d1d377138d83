"""Equal processor time, and the table of roll-outs."""

from __future__ import annotations

import json

import pytest
from made_triplets import write_game

from iwm_fast.benchmarks import steps_ahead
from iwm_fast.benchmarks.steps_ahead import equal_steps, require_chains, seconds_per_step, table
from iwm_fast.errors import UserError


def run_of(last, copy=1.0):
    rolled = {"model": [0.1, last], "shuffled": [0.5, 0.9], "copy": [0.4, copy]}
    evaluation = {"rollout": rolled, "mrr": 0.5, "mrr_shuffled": 0.25, "rank_me": 20.0}
    return {"evaluation": evaluation, "cpu_seconds": 80.0, "steps": 1200}


def test_each_horizon_has_the_processor_time_of_the_first():
    assert equal_steps({"1": 0.05, "2": 0.08, "4": 0.15}, [1, 2, 4], 1200) == {1: 1200, 2: 750, 4: 400}


def test_the_table_has_each_horizon_s_error_with_its_interval():
    arms = [{"name": "1", "runs": [run_of(0.4), run_of(0.6, 2.0)]}, {"name": "2", "runs": [run_of(0.3)]}]
    head, _, one, two = (line.split(" | ") for line in table(arms).splitlines())
    column = head.index("error, 2 ahead")
    assert (one[column], two[column]) == ("0.5 ± 1.27", "0.3")  # 12.706 · std / √2
    assert one[head.index("over a copy, 2 ahead")].startswith("0.35 ")
    assert one[1] == "1,200"


def test_the_table_has_the_states_that_are_read_where_they_are_recorded():
    run = run_of(0.4)
    ahead = [[0.9, 0.7, None], [0.5, 0.3, None]]
    run["evaluation"]["rollout"]["state_r2"] = {"target": [0.9, 0.8, None], "prediction": ahead}
    head, _, row = (line.split(" | ") for line in table([{"name": "1", "runs": [run, run]}]).splitlines())
    assert head[-1] == "R² of the state, 2 ahead |"
    assert row[-1] == "0.4 ± 0 |"


def test_short_trainings_are_not_repeated_after_an_interruption(tmp_path, monkeypatch):
    """Steps of 10 ms after a start of 3 s; the start is no part of a step."""
    commands = []

    def train(*command):
        steps = next(int(word.partition("=")[2]) for word in command if word.startswith("train.steps="))
        commands.append(command)
        (tmp_path / command[command.index("--out") + 1].rpartition("/")[2]).mkdir()
        return 3 + 0.01 * steps

    monkeypatch.setattr(steps_ahead, "run_iwm", train)
    car = write_game(tmp_path / "car").parent
    words = ("game.yaml", car, tmp_path)
    assert seconds_per_step(*words, [1], ["data.threads=1"]) == pytest.approx({"1": 0.01})
    file = tmp_path / "seconds_per_step.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"seconds": {"1": 0.5}}))
    found = seconds_per_step(*words, [1, 2], ["data.threads=1"])
    assert found == pytest.approx({"1": 0.5, "2": 0.01})
    assert len(commands) == 4
    assert seconds_per_step(*words, [1, 2], ["data.threads=1"]) == found
    assert len(commands) == 4
    # Other settings, and other data, take another time.
    assert seconds_per_step(*words, [1], ["data.threads=2"]) == pytest.approx({"1": 0.01})
    (car / "more.txt").write_text("x")
    assert seconds_per_step(*words, [1], ["data.threads=2"]) == pytest.approx({"1": 0.01})
    assert len(commands) == 8


def test_processor_seconds_are_of_trainings_that_were_not_interrupted():
    late = run_of(0.4) | {"cpu_seconds": 4.0, "resumed": True}
    head, _, both, none = (
        line.split(" | ")
        for line in table([{"name": "1", "runs": [run_of(0.4), late]}, {"name": "2", "runs": [late]}]).splitlines()
    )
    column = head.index("processor seconds")
    assert (both[column], none[column]) == ("80", "–")


def test_episodes_too_short_for_a_roll_out_are_refused_before_training(tmp_path):
    write_game(tmp_path / "car" / "test", steps=6)
    require_chains("game.yaml", tmp_path / "car", ["eval.horizon=6"])
    with pytest.raises(UserError, match=r"car: its test set has fewer than two chains of eval.horizon 7 consecutive"):
        require_chains("game.yaml", tmp_path / "car", ["eval.horizon=7"])
