"""Acting with a trained run: episodes, pictures, controls, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_triplets import write_game
from PIL import Image
from small_run import small_config

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (the extra games)")

import iwm_fast  # noqa: E402
from iwm_fast.benchmarks import planning  # noqa: E402
from iwm_fast.benchmarks.adapters.stable_worldmodel import CostObject  # noqa: E402
from iwm_fast.cli.main import main  # noqa: E402
from iwm_fast.config.load import dump_config, load_config  # noqa: E402
from iwm_fast.data.tools.record_gym import record  # noqa: E402
from iwm_fast.engine import pretrain  # noqa: E402
from iwm_fast.errors import UserError  # noqa: E402
from iwm_fast.eval.acting.act import Acting, act, open_actor, summary  # noqa: E402
from iwm_fast.eval.acting.frames import Resizer, find_neighbours  # noqa: E402
from iwm_fast.eval.world_model.frames import FrameReader  # noqa: E402
from iwm_fast.eval.world_model.planning.plan import Settings  # noqa: E402
from iwm_fast.eval.world_model.planning.state_head import fit_state_head  # noqa: E402
from iwm_fast.eval.world_model.rollout import rollout_errors  # noqa: E402
from iwm_fast.export.weights import export_run  # noqa: E402
from iwm_fast.games import POINT_MASS  # noqa: E402
from iwm_fast.games.recording import Recording  # noqa: E402

ROOM = Recording(
    POINT_MASS, train=24, test=8, size=32, episode_steps=6, arguments={"size": 32, "apart": 0.2}, persistence=0.5
)
QUICK = Settings(horizon=3, candidates=12, iterations=2)
WORDS = ("--horizon", "3", "--candidates", "12", "--iterations", "2", "--decisions", "3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acting")
    record(ROOM, folder / "room")
    config = small_config(folder / "room" / "train", actions__groups=["external"], train__steps=3)
    pretrain(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def actor(run):
    return open_actor(run)


def played(actor, **changes):
    told = {"env": POINT_MASS, "episodes": 2, "settings": QUICK, "most": 4, "every": 2}
    return act(actor, Acting(**told | changes))


@pytest.mark.parametrize(("ema", "steps_ahead"), [((1.0, 1.0), 1), ((1.0, 1.0), 2), ((0.9, 1.0), 1)])
def test_a_target_that_stays_is_not_planned_through(actor, ema, steps_ahead):
    """Its predictions are in a space that the predictor does not read, unless it was trained on them."""
    train = actor.config.train.model_copy(update={"ema": ema, "horizon": steps_ahead})
    told = replace(actor, config=actor.config.model_copy(update={"train": train}))
    assert played(told, policy="random", episodes=1)
    assert played(told, policy="greedy", episodes=1)
    if (ema, steps_ahead) != ((1.0, 1.0), 1):
        assert played(told, episodes=1)
        return
    with pytest.raises(UserError, match=r"horizon is 3, and train\.ema"):
        played(told)


def test_python_refuses_what_act_refuses_also_of_an_export(run, tmp_path):
    """A target that stays: a plan and a roll-out of one action are made, longer ones are not."""
    still, exported = tmp_path / "still", tmp_path / "export"
    shutil.copytree(run, still)
    (still / "config.yaml").write_text(dump_config(load_config(still / "config.yaml", ["train.ema=[1.0,1.0]"])))
    assert main(["export", str(still), "--out", str(exported)]) == 0
    for folder in (still, exported):
        world = iwm_fast.load(folder)
        frame = np.zeros((world.image_size, world.image_size, 3), np.uint8)
        one = np.zeros((1, 1, world.space.dim), np.float32)
        assert len(world.plan(frame, frame, horizon=1, candidates=4, iterations=1).actions) == 1
        assert torch.equal(world.roll_out(frame, one)[:, 0], world.predict(frame, one[0, 0]))
        with pytest.raises(UserError, match=r"plan: horizon is 2, and train\.ema \[1\.0, 1\.0\] kept"):
            world.plan(frame, frame, horizon=2)
        with pytest.raises(UserError, match=r"roll_out: train\.ema \[1\.0, 1\.0\] kept .*: give one action"):
            world.roll_out(frame, np.repeat(one, 2, axis=1))
    assert len(iwm_fast.load(run).plan(frame, frame, horizon=2, candidates=4, iterations=1).actions) == 2


def test_the_command_writes_episodes_and_a_gif(run, tmp_path, capsys):
    out, answer = tmp_path / "acted", tmp_path / "answer.json"
    words = ["act", str(run), POINT_MASS, "--out", str(out), "--episodes", "2", "--replan", "2", *WORDS]
    assert main([*words, "--json", str(answer)]) == 0
    assert "success, 2 episodes" in capsys.readouterr().out
    found = json.loads((out / "episodes.json").read_text())
    assert found["schema"] == "iwm-fast-act/1"
    assert (found["env"], found["replan"], found["action_repeat"], found["plan"]["horizon"]) == (POINT_MASS, 2, 1, 3)
    assert len(found["episodes"]) == 2
    for number, episode in enumerate(found["episodes"]):
        assert episode["episode"] == number
        assert episode["decisions"] == len(episode["actions"]) == len(episode["distances"]) == episode["steps"]
        assert episode["planned_at"] == list(range(0, episode["decisions"], 2))
        assert len(episode["costs"]) == len(episode["planned_at"])
        assert episode["return"] == float(episode["success"])
    assert json.loads(answer.read_text())["episodes"] == found["episodes"]
    assert sorted(path.name for path in out.iterdir()) == ["episode_000.gif", "episodes.json", "index.html"]
    with Image.open(out / "episode_000.gif") as gif:
        assert gif.n_frames == found["episodes"][0]["decisions"] + 1


def test_the_page_shows_the_first_episode_with_what_was_foreseen(actor, tmp_path):
    told = {"env": POINT_MASS, "episodes": 2, "settings": QUICK, "most": 4, "every": 2, "gifs": 0}
    act(actor, Acting(**told), out=tmp_path / "planned")
    page = (tmp_path / "planned" / "index.html").read_text()
    known = json.loads((tmp_path / "planned" / "episodes.json").read_text())
    first = known["episodes"][0]
    plans = first["planned_at"]
    assert page.count("<img") == 3 + len(plans) * (1 + QUICK.horizon)
    for number, cost in zip(plans, first["costs"], strict=True):
        assert f"After {number} actions: distance {first['distances'][number]:.2f}, cost of the plan {cost:.2f}" in page
    assert "Episode 0: the goal was" in page
    assert "foreseen" in page
    assert "2 episodes" in page
    act(actor, Acting(**told | {"policy": "random"}), out=tmp_path / "random")
    page = (tmp_path / "random" / "index.html").read_text()
    assert (
        page.count("<img")
        == 3 + json.loads((tmp_path / "random" / "episodes.json").read_text())["episodes"][0]["decisions"]
    )
    assert "foreseen" not in page


def test_what_happened_is_what_the_actions_do_in_a_fresh_environment(actor):
    episode = played(actor, episodes=1)[0]
    env = gymnasium.make(POINT_MASS, render_mode="rgb_array", size=32, apart=0.2)
    env.reset(seed=episode["seed"])
    world, goal = actor.model, torch.from_numpy(env.unwrapped.goal_picture())[None]
    with torch.no_grad():
        for action, distance in zip(episode["actions"], episode["distances"], strict=True):
            frame = torch.from_numpy(env.render())[None]
            assert distance == pytest.approx(float((world.targets(frame) - world.targets(goal)).norm()), rel=1e-4)
            env.step(np.array(action, np.float32))


def test_a_trained_run_s_plan_costs_what_its_roll_outs_cost(run):
    world = iwm_fast.load(run)
    recorded = sorted((run.parent / "room" / "test" / "frames").iterdir())
    source, goal = world.read(recorded[:1]), world.read(recorded[-1:])
    plan = world.plan(recorded[0], recorded[-1], horizon=3, candidates=20, iterations=2)
    frames = torch.cat([source, goal.expand(3, -1, -1, -1)])[None].repeat(2, 1, 1, 1, 1)
    errors = rollout_errors(world.model, frames, torch.from_numpy(np.stack([plan.actions] * 2)))["model"][0]
    np.testing.assert_allclose(plan.along, np.sqrt(errors * world.targets(goal).numel()), rtol=1e-5)
    assert plan.cost == pytest.approx(plan.along[-1], rel=1e-5)
    assert set(plan.values[0]) == {"action_0", "action_1"}


def test_a_seed_gives_the_same_episodes_and_another_seed_others(actor):
    first = played(actor)
    assert played(actor) == first
    assert [e["seed"] for e in played(actor, seed=1)] != [e["seed"] for e in first]
    acting = Acting(POINT_MASS, episodes=2, settings=QUICK, most=4, every=2)
    assert act(actor, acting, known=first[:1]) == first


@pytest.mark.parametrize("policy", ["greedy", "shuffled", "random"])
def test_controls_play_the_same_episodes_otherwise(actor, policy):
    plain, control = played(actor), played(actor, policy=policy)
    assert [e["seed"] for e in control] == [e["seed"] for e in plain]
    assert [e["actions"] for e in control] != [e["actions"] for e in plain]
    if policy == "random":
        assert control[0]["costs"] == []
        assert control[0]["distances"] == [None] * control[0]["decisions"]
    if policy == "greedy":
        assert control[0]["planned_at"] == list(range(control[0]["decisions"]))


def test_an_action_is_held_for_as_many_steps_as_are_given(actor):
    for episode in played(actor, repeat=3, most=2):
        assert episode["steps"] == 3 * episode["decisions"] or episode["success"]


def test_frames_are_those_that_evaluation_reads(actor):
    """At the model's size unchanged, at another as the reader of recorded files resizes them."""
    files = [actor.triplets.manifest.parent / name for name in ("frames/000000_00000.png", "frames/000000_00001.png")]
    pictures, _ = FrameReader(actor.triplets, actor.config.model.image, actor.config.data).read(np.array([0, 1]))
    config = actor.config.model_copy(update={"model": actor.config.model.model_copy(update={"image": 48})})
    larger, _ = FrameReader(actor.triplets, config.model.image, config.data).read(np.array([0, 1]))
    with closing(Resizer(32)) as same, closing(Resizer(48)) as resize:
        for place, file in enumerate(files):
            raw = np.asarray(Image.open(file))
            assert torch.equal(same(raw)[0], pictures[place])
            assert torch.equal(resize(raw)[0], larger[place])


def test_a_frame_s_nearest_neighbour_is_itself(actor):
    neighbours = find_neighbours(actor.model, actor.config.data, actor.triplets, 10)
    assert len(neighbours.frames) == 10
    with torch.no_grad():
        found = neighbours.nearest(actor.model.targets(neighbours.frames))
    assert all(np.array_equal(a, b) for a, b in zip(found, neighbours.frames.numpy(), strict=True))


def test_distances_between_states_are_of_a_head_fitted_to_the_recorded_ones(run, actor, tmp_path):
    """The goal, the third and fourth numbers that the environment observes, is in no picture: its R² says so."""
    acting = Acting(POINT_MASS, settings=Settings(3, candidates=12, iterations=2, distance="state"), most=2)
    records = act(actor, acting, out=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "episodes.json").read_text())
    head = fit_state_head(actor.model, actor.config.data, actor.triplets)
    assert told["state_r2"] == head.r2.tolist()
    assert len(told["state_r2"]) == 4
    env = gymnasium.make(POINT_MASS, render_mode="rgb_array", size=32, apart=0.2)
    env.reset(seed=records[0]["seed"])
    with torch.no_grad():
        ends = actor.model.targets(torch.from_numpy(np.stack([env.render(), env.unwrapped.goal_picture()])))
    assert records[0]["distances"][0] == pytest.approx(float(head.distance(ends[:1], ends[1:])), rel=1e-3)
    assert "state_r2" not in act(actor, Acting(POINT_MASS, settings=QUICK, most=1))[0]


def test_choices_are_acted_with_too(tmp_path):
    pytest.importorskip("pygame", reason="pygame is not installed (the extra games)")
    lake = {"size": 32, "episode_steps": 5, "arguments": {"is_slippery": False}, "still": True}
    record(Recording("FrozenLake-v1", train=16, test=0, **lake), tmp_path / "lake")
    pretrain(small_config(tmp_path / "lake" / "train", actions__groups=["external"], train__steps=2), tmp_path / "run")
    actor = open_actor(tmp_path / "run")
    acting = Acting("FrozenLake-v1", settings=QUICK, most=3)
    records = act(actor, acting)
    assert all(action in range(4) for action in records[0]["actions"])
    with pytest.raises(UserError, match="needs continuous actions"):
        act(actor, Acting("FrozenLake-v1", settings=Settings(horizon=2, method="gradient"), most=3))
    with pytest.raises(UserError, match=r"its actions are 2 numbers from .* the run was trained on one of 4"):
        act(actor, Acting(POINT_MASS, settings=QUICK))


def test_an_export_acts_as_its_run_given_the_data(run, actor, tmp_path):
    folder = export_run(run, tmp_path / "weights")
    with pytest.raises(UserError, match="an export, which does not name its data: give --data DIR"):
        open_actor(folder)
    of_export = open_actor(folder, data=str(run.parent / "room" / "train"))
    assert played(of_export) == played(actor)


def test_data_that_are_gone_or_were_not_recorded_are_said(run, actor, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(run.parent / "room" / "train"), "/nowhere/train"))
    with pytest.raises(UserError, match="its data, /nowhere/train, are not there: give --data DIR"):
        open_actor(moved)
    found = open_actor(moved, data=str(run.parent / "room"))  # the test part of it
    assert (found.recording, len(found.triplets)) == (actor.recording, 8)


def test_a_share_has_wilson_s_interval():
    """By the closed form, and Wilson's own property at no success: 0 to z² / (n + z²)."""
    rows = [{"success": number < 17, "return": 1.0, "steps": 2} for number in range(20)]
    found = summary(rows)
    assert found["success"] == 0.85
    assert found["success_interval"] == pytest.approx([0.6396, 0.9476], abs=1e-4)
    none = summary([{"success": False, "return": 0.0, "steps": 1}] * 20)
    assert none["success_interval"] == pytest.approx([0, 1.96**2 / (20 + 1.96**2)], abs=1e-4)


def test_the_benchmark_plays_every_policy_and_resumes(run, tmp_path, monkeypatch, capsys):
    quick = {"settings": {"horizon": 2, "candidates": 6, "iterations": 1}, "every": 2, "most": 3}
    monkeypatch.setitem(planning.PLAYED, POINT_MASS, quick)
    file = tmp_path / "planning.json"

    def measured(episodes):
        words = ["--runs", str(run), "--episodes", str(episodes), "--json", str(file)]
        monkeypatch.setattr("sys.argv", ["planning", *words])
        planning.main()
        return json.loads(file.read_text())["rows"]

    first = measured(1)
    assert [row["policy"] for row in first] == ["plan", "greedy", "shuffled", "random"]
    first[0]["episodes"][0]["mark"] = 1  # an episode that is known is not played again
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": first}))
    second = measured(2)
    assert [len(row["episodes"]) for row in second] == [2] * 4
    assert second[0]["episodes"][0]["mark"] == 1
    assert second[0]["episodes"][1]["seed"] == second[3]["episodes"][1]["seed"]
    assert f"| {POINT_MASS} | l2 | 1 | " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*sys.argv, "--distance", "state", "--policies", "greedy"])
    planning.main()
    assert f"| {POINT_MASS} | state | 1 |  | " in capsys.readouterr().out
    assert [row["plan"]["distance"] for row in json.loads(file.read_text())["rows"]] == ["l2"] * 4 + ["state"]


def test_the_benchmark_s_table_has_wilson_s_intervals_over_all_runs():
    episodes = [{"success": number < 9} for number in range(10)]
    told = {"env": "a", "policy": "plan", "episodes": episodes}
    rows = [{**told, "run": run, "plan": {"distance": "l2"}} for run in "xy"]
    rows.append({**told, "run": "x", "plan": {"distance": "state"}})
    lines = planning.table(rows).splitlines()
    assert lines[2:] == [
        "| a | l2 | 2 | 18 of 20 (0.70 – 0.97) |  |  |  |", "| a | state | 1 | 9 of 10 (0.60 – 0.98) |  |  |  |",
    ]  # fmt: skip


def test_stable_worldmodel_s_solvers_call_our_cost_with_a_batch_of_one():
    cost = CostObject(lambda actions: actions.square().sum(dim=(1, 2)).double())
    found = cost.get_cost({}, torch.ones(1, 5, 3, 2))
    assert (found.tolist(), found.dtype) == ([[6.0] * 5], torch.float32)


LINES = {
    "horizon": ([POINT_MASS, "--horizon", "0"], "horizon is 0: give a whole number from 1 on"),
    "goal of another size": ([POINT_MASS, "--goal", "GOAL"], "20 × 10 pixels: give a recorded frame, 32 × 32"),
    "no such goal": ([POINT_MASS, "--goal", "gone.png"], "--goal gone.png: no such file"),
    "other actions": (
        ["FrozenLake-v1"],
        "FrozenLake-v1: its actions are one of 4 choices, and the run was trained",
    ),
    "no such game": (["NoSuchGame-v0"], "NoSuchGame-v0: gymnasium cannot make it"),
    "argument": ([POINT_MASS, "--env-argument", "size"], "--env-argument size: give KEY=VALUE"),
    "wrong argument": ([POINT_MASS, "--env-argument", "width=3"], "gymnasium cannot make it: "),
}


@pytest.mark.parametrize("name", LINES)
def test_a_mistake_is_one_line_and_leaves_nothing(run, tmp_path, capsys, name):
    words, line = LINES[name]
    Image.new("RGB", (20, 10)).save(tmp_path / "goal.png")
    words = [str(tmp_path / "goal.png") if word == "GOAL" else word for word in words]
    assert main(["act", str(run), *words, "--out", str(tmp_path / "out"), "--episodes", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert line in said
    assert not (tmp_path / "out").exists()


def test_runs_and_folders_that_cannot_be_acted_with_are_one_line(run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "config.yaml").write_text(small_config(tmp_path).model_dump_json())  # JSON is YAML
    with pytest.raises(UserError, match="has no actions to act with: it was trained on images"):
        open_actor(tmp_path / "images")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already; choose another --out"):
        act(open_actor(run), Acting(POINT_MASS, settings=QUICK), out=tmp_path / "out")
    game = write_game(tmp_path / "other", episodes=2, steps=3)
    with pytest.raises(UserError, match="its actions are push, turn, and the run was trained on action_0, action_1"):
        open_actor(run, data=str(game))
