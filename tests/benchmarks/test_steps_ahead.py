"""Equal processor time, and the table of roll-outs."""

from __future__ import annotations

import json

import pytest

from iwm_fast.benchmarks import steps_ahead
from iwm_fast.benchmarks.steps_ahead import equal_steps, seconds_per_step, table


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
    (tmp_path / "seconds_per_step.json").write_text(json.dumps({"1": 0.5}))
    found = seconds_per_step("game.yaml", tmp_path / "car", tmp_path, [1, 2], ["data.threads=1"])
    assert found == pytest.approx({"1": 0.5, "2": 0.01})
    assert len(commands) == 2
    assert seconds_per_step("game.yaml", tmp_path / "car", tmp_path, [1, 2], []) == found
    assert len(commands) == 2
