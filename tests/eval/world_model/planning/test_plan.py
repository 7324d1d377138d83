"""Plans of real networks: their costs are those of roll-outs, their actions the run's, and a seed gives one plan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from worlds import SIDE, pictures, tiny_config, tiny_model

from iwm_fast.actions.external import space_of
from iwm_fast.api import WorldModel
from iwm_fast.config import ActionsConfig
from iwm_fast.config.external import ExternalActions
from iwm_fast.config.sections.model import TargetEncoderConfig
from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.planning import cost as costs
from iwm_fast.eval.world_model.planning.cost import GoalCost
from iwm_fast.eval.world_model.rollout import rollout_errors
from iwm_fast.models.iwm import IWM

PUSHES = {"kind": "continuous", "names": ("push", "turn"), "low": (-2, 0), "high": (1, 4), "neutral": (0, 0)}
CHOICES = {"kind": "discrete", "names": ("left", "stay", "right")}


def world_of(described, unread=None, **model):
    """Return a world with random weights, whose predictions depend on the action."""
    config = tiny_config().model.model_copy(update=model)
    actions = ActionsConfig(groups=("external",), external=ExternalActions(**described))
    space = space_of(actions)
    torch.manual_seed(0)
    network = IWM(config, space.dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return WorldModel(network, actions, space, unread=unread)


@pytest.fixture(scope="module")
def pushed():
    return world_of(PUSHES)


@pytest.fixture(scope="module")
def chosen():
    return world_of(CHOICES)


def rolled_out(world, source, goal, actions):
    """Return the L2 distance to the goal after each action, from the errors of the evaluation's roll-outs."""
    frames = torch.cat([source, goal.expand(len(actions), -1, -1, -1)])[None].repeat(2, 1, 1, 1, 1)
    errors = rollout_errors(world.model, frames, torch.from_numpy(np.stack([actions] * 2)))["model"][0]
    return np.sqrt(errors * world.targets(goal).numel())


@pytest.mark.parametrize("method", ["cem", "mppi", "gradient"])
@pytest.mark.parametrize("score", ["last", "mean", "nearest", "arrival"])
def test_a_plan_s_costs_are_those_of_the_evaluation_s_roll_outs(pushed, method, score):
    source, goal = pictures(1), pictures(1, seed=3)
    plan = pushed.plan(source, goal, horizon=3, method=method, candidates=23, iterations=3, score=score)
    far = rolled_out(pushed, source, goal, plan.actions)
    np.testing.assert_allclose(plan.along, far, rtol=1e-5)
    wanted = {"last": far[-1], "mean": far.mean(), "nearest": far.min(), "arrival": far[-1] + far.mean() / 10}
    assert plan.cost == pytest.approx(wanted[score], rel=1e-5)
    assert plan.cost == plan.history[-1] == min(plan.history)
    assert plan.distance_now == pytest.approx(float((pushed.targets(source) - pushed.targets(goal)).norm()), rel=1e-5)
    z = pushed.model.encode(source)
    with torch.no_grad():
        for action, predicted in zip(plan.actions, plan.predictions, strict=True):
            z = pushed.model.predict(z, torch.from_numpy(action[None]))
            torch.testing.assert_close(predicted, z[0])


def test_the_cosine_is_the_chord_between_mean_tokens(pushed):
    source, goal = pictures(1), pictures(1, seed=3)
    plan = pushed.plan(source, goal, horizon=2, candidates=11, iterations=2, distance="cosine")
    wanted = torch.nn.functional.normalize(pushed.targets(goal).double().mean(dim=1), dim=1)
    found = torch.nn.functional.normalize(plan.predictions.double().mean(dim=1), dim=1)
    np.testing.assert_allclose(plan.along, (found - wanted).norm(dim=1).numpy(), rtol=1e-4)


def test_choices_are_those_of_brute_force_through_the_network(chosen):
    source, goal = pictures(1), pictures(1, seed=3)
    plan = chosen.plan(source, goal, horizon=3)
    least, best = np.inf, None
    for sequence in itertools.product(range(3), repeat=3):
        actions = np.eye(3, dtype=np.float32)[list(sequence)]
        far = rolled_out(chosen, source, goal, actions)[-1]
        if far < least:
            least, best = far, actions
    assert np.array_equal(plan.actions, best)
    assert plan.cost == pytest.approx(least, rel=1e-5)
    assert plan.tried == 27
    assert [{name for name, value in values.items() if value} for values in plan.values] == [
        {chosen.action_names[int(row.argmax())]} for row in best
    ]
    sampled = chosen.plan(source, goal, horizon=3, candidates=20, iterations=2)
    assert sampled.tried == 40
    assert np.array_equal(np.sort(sampled.actions, axis=1)[:, -2:], [[0, 1]] * 3)
    assert sampled.cost >= plan.cost * (1 - 1e-6)


def test_values_are_physical_and_within_the_run_s_range(pushed):
    plan = pushed.plan(pictures(1), pictures(1, seed=3), horizon=4, candidates=50, iterations=2)
    for action, values in zip(plan.actions, plan.values, strict=True):
        assert -2 <= values["push"] <= 1
        assert 0 <= values["turn"] <= 4
        np.testing.assert_allclose(pushed.vector(values), action, atol=1e-6)


@pytest.mark.parametrize("method", ["cem", "mppi", "gradient"])
def test_a_seed_gives_one_plan_whatever_the_chunk(method):
    plans = []
    for chunk in (1, 64):
        world = world_of(PUSHES)
        world._chunk = chunk
        told = {"horizon": 3, "method": method, "candidates": 37, "iterations": 3}
        plans.append(world.plan(pictures(1), pictures(1, seed=3), seed=5, **told))
        other = world.plan(pictures(1), pictures(1, seed=3), seed=6, **told)
        assert not np.array_equal(other.actions, plans[0].actions)
    assert np.array_equal(plans[0].actions, plans[1].actions)
    assert plans[0].history == plans[1].history
    assert torch.equal(plans[0].predictions, plans[1].predictions)


def test_candidates_go_through_the_predictor_in_equal_blocks_within_the_memory(pushed, monkeypatch):
    """One call per block and step, none per candidate; and blocks change nothing but rounding."""
    cost = GoalCost(pushed.model, pushed.model.encode(pictures(1)), pushed.targets(pictures(1, seed=3)))
    actions = torch.rand(50, 3, 2, generator=torch.Generator().manual_seed(0))
    sizes = []
    predict = pushed.model.predict
    monkeypatch.setattr(pushed.model, "predict", lambda z, told: (sizes.append(len(told)), predict(z, told))[1])
    whole, (_, gradient) = cost.along(actions), cost.slope(actions)
    assert sizes[:3] == [50] * 3
    sizes.clear()
    tokens, width = 2 * 4, 16
    monkeypatch.setitem(costs._ROOM, "cpu", 4 * tokens * width * 16 * 17)  # 17 candidates
    torch.testing.assert_close(cost.along(actions), whole, rtol=1e-5, atol=0)
    assert sizes == [17] * 6 + [16] * 3
    torch.testing.assert_close(cost.slope(actions)[1], gradient, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_differences(pushed):
    double = world_of(PUSHES)
    double.model.double()
    cost = GoalCost(double.model, double.model.encode(pictures(1)), double.targets(pictures(1, seed=3)))
    actions = torch.full((1, 2, 2), 0.3)
    _, gradient = cost.slope(actions)
    for h, a in itertools.product(range(2), range(2)):
        step = torch.zeros_like(actions)
        step[0, h, a] = 1e-2
        difference = float((cost(actions + step) - cost(actions - step))[0]) / 2e-2
        assert float(gradient[0, h, a]) == pytest.approx(difference, rel=2e-2, abs=1e-3)
    assert all(parameter.grad is None for parameter in double.model.parameters())


def test_another_one_s_actions_are_the_control(pushed):
    """Shuffled costs are those of the candidate before."""
    source, goal = pushed.model.encode(pictures(1)), pushed.targets(pictures(1, seed=3))
    actions = torch.rand(9, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, shuffled = (GoalCost(pushed.model, source, goal, shuffled=told)(actions) for told in (False, True))
    torch.testing.assert_close(shuffled, plain.roll(1))


def test_the_rest_of_a_plan_is_searched_near(pushed):
    source, goal = pictures(1), pictures(1, seed=3)
    first = pushed.plan(source, goal, horizon=3, candidates=60, iterations=6)
    again = pushed.plan(source, goal, horizon=3, candidates=2, iterations=1, start=first.actions)
    assert again.cost <= first.cost * (1 + 1e-5)
    shorter = pushed.plan(source, goal, horizon=2, candidates=2, iterations=1, start=first.actions)
    assert len(shorter.actions) == 2


def test_frames_may_be_a_window_and_nothing_is_changed(pushed):
    source, goal = pictures(1), pictures(1, seed=3)
    before = {name: value.clone() for name, value in pushed.model.state_dict().items()}
    told = {"horizon": 2, "candidates": 8, "iterations": 2, "method": "gradient"}
    plan = pushed.plan(source, goal, **told)
    for frames in (source[:, None], source[:, None].numpy(), source[0].numpy()):
        assert np.array_equal(pushed.plan(frames, goal, **told).actions, plan.actions)
    assert all(torch.equal(value, before[name]) for name, value in pushed.model.state_dict().items())
    assert not plan.predictions.requires_grad


def test_a_window_slides_over_what_is_predicted():
    """With a history of two frames: the cost is that of the evaluation's roll-outs from both, not from one."""
    world = world_of(PUSHES, history=2)
    frames, goal = pictures(2), pictures(1, seed=3)
    plan = world.plan(frames[None], goal, horizon=3, candidates=12, iterations=2)
    given = torch.cat([frames, goal.expand(3, -1, -1, -1)])[None].repeat(2, 1, 1, 1, 1)
    errors = rollout_errors(world.model, given, torch.from_numpy(np.stack([plan.actions] * 2)))["model"][0]
    np.testing.assert_allclose(plan.along, np.sqrt(errors * world.targets(goal).numel()), rtol=1e-5)
    torch.testing.assert_close(plan.predictions, world.roll_out(frames[None], plan.actions)[0])
    alone = world.plan(frames[1:], goal, horizon=3, candidates=12, iterations=2)
    assert abs(alone.cost - plan.cost) > 1e-3
    assert alone.distance_now == pytest.approx(plan.distance_now)


GOAL = pictures(1, seed=3)
MISTAKES = {
    "horizon": (PUSHES, {"horizon": 0}, "horizon is 0: give a whole number from 1 on"),
    "half a step": (PUSHES, {"horizon": 1.5}, "horizon is 1.5: give a whole number"),
    "one candidate": (PUSHES, {"candidates": 1}, "candidates is 1: give a whole number from 2 on"),
    "no iteration": (PUSHES, {"iterations": 0}, "iterations is 0"),
    "seed": (PUSHES, {"seed": -1}, "seed is -1"),
    "method": (PUSHES, {"method": "icem"}, "method is 'icem': give cem, mppi, gradient"),
    "distance": (PUSHES, {"distance": "l1"}, "distance is 'l1': give l2, cosine, state"),
    "score": (PUSHES, {"score": "sum"}, "score is 'sum': give last, mean, nearest, arrival"),
    "gradient of choices": (CHOICES, {"method": "gradient"}, "needs continuous actions"),
    "start": (PUSHES, {"start": [1.0, 2.0, 3.0]}, "give 2 numbers"),
    "goal of another size": (PUSHES, {"goal": np.zeros((9, 9, 3), np.uint8)}, r"images are uint8 \(9, 9, 3\)"),
    "two goals": (PUSHES, {"goal": pictures(2)}, "frames and goal are 1 and 2 images"),
    "window": (PUSHES, {"frames": pictures(2)[None]}, "images are windows of 2 frames: this model takes windows of 1"),
    "no file": (PUSHES, {"goal": "no_such.png"}, "no_such.png: no such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(pushed, chosen, name):
    described, told, message = MISTAKES[name]
    world = pushed if described is PUSHES else chosen
    given = {"frames": pictures(1), "goal": GOAL, "horizon": 2, "iterations": 2} | told
    with pytest.raises(UserError, match=message) as raised:
        world.plan(given.pop("frames"), given.pop("goal"), **given)
    assert "\n" not in str(raised.value)


def test_runs_that_cannot_plan_say_so(tmp_path):
    config = tiny_config()
    model, space = tiny_model(config)
    with pytest.raises(UserError, match="this run has no actions to plan: it was trained on images"):
        WorldModel(model, config.actions, space).plan(pictures(1), GOAL)
    frozen = world_of(PUSHES, "it predicts elsewhere", target="frozen", target_init=str(tmp_path))
    with pytest.raises(UserError, match="horizon is 8, and it predicts elsewhere: give horizon 1, or train with"):
        frozen.plan(pictures(1), GOAL)
    assert len(frozen.plan(pictures(1), GOAL, horizon=1, candidates=5).actions) == 1
    wide = TargetEncoderConfig(encoder={"depth": 1, "width": 48, "heads": 3})
    wider = world_of(PUSHES, "it predicts elsewhere", target="frozen", target_init=str(tmp_path), target_encoder=wide)
    plan = wider.plan(pictures(1), GOAL, horizon=1, candidates=5)
    assert plan.predictions.shape == (1, wider.model.encoder.patches, 48)
    assert pictures(1).shape[1] == SIDE
