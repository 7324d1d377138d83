"""Solvers as functions of a cost: known optima, brute force, bounds, and seeds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.planning.distributions import ActionKind, Categorical, Gaussian
from iwm_fast.eval.world_model.planning.solvers import Search, descend, search

BOX = ActionKind(torch.tensor([-1.0, -0.5]), torch.tensor([1.0, 0.25]))
CHOICES = ActionKind(torch.zeros(3), torch.ones(3), choices=3)
HORIZON = 3


def linear(matrix, gain, goal):
    """Return the cost |x_H − goal|² of x ← M x + G a from 0, which is quadratic in the actions, and its gradient."""

    def ends(actions):
        x = torch.zeros(len(actions), len(goal), dtype=torch.float64)
        for told in actions.double().unbind(dim=1):
            x = x @ matrix.T + told @ gain.T
        return x

    def cost(actions):
        return (ends(actions) - goal).square().sum(dim=1)

    def slope(actions):
        told = actions.clone().requires_grad_(True)
        with torch.enable_grad():
            found = cost(told)
            (gradient,) = torch.autograd.grad(found.sum(), told)
        return found.detach(), gradient

    return cost, slope


def problem(goal):
    matrix = torch.tensor([[0.9, 0.1], [-0.2, 0.8]], dtype=torch.float64)
    gain = torch.tensor([[0.5, 0.0], [0.1, 1.0]], dtype=torch.float64)
    return linear(matrix, gain, torch.tensor(goal, dtype=torch.float64))


def solved(method, goal, *, seed=0, iterations=None, start=None):
    cost, slope = problem(goal)
    if method == "gradient":
        return descend(slope, BOX, Search(HORIZON, 8, iterations or 150, seed, start))
    return search(cost, BOX, Search(HORIZON, 400, iterations or 12, seed, start), method)


METHODS = ("cem", "mppi", "gradient")


@pytest.mark.parametrize("method", METHODS)
def test_a_reachable_goal_of_linear_dynamics_is_reached(method):
    found = solved(method, [0.6, -0.4])
    assert found.cost < 1e-4
    cost, _ = problem([0.6, -0.4])
    assert found.cost == pytest.approx(float(cost(found.actions[None])))


@pytest.mark.parametrize("method", METHODS)
def test_beyond_the_bounds_the_solution_is_that_of_bounded_least_squares(method):
    """The goal is out of reach, so the constrained optimum is at bounds; by projected gradient steps of 1 / L."""
    goal = torch.tensor([3.0, -2.0], dtype=torch.float64)
    matrix = torch.tensor([[0.9, 0.1], [-0.2, 0.8]], dtype=torch.float64)
    gain = torch.tensor([[0.5, 0.0], [0.1, 1.0]], dtype=torch.float64)
    effect = torch.cat([torch.linalg.matrix_power(matrix, HORIZON - 1 - h) @ gain for h in range(HORIZON)], dim=1)
    low, high = BOX.low.double().repeat(HORIZON), BOX.high.double().repeat(HORIZON)
    rate, best = 1 / torch.linalg.matrix_norm(effect, 2) ** 2, torch.zeros_like(low)
    for _ in range(3000):
        best = (best - rate * effect.T @ (effect @ best - goal)).clamp(low, high)
    least = float((effect @ best - goal).square().sum())
    found = solved(method, goal.tolist())
    assert least > 0.5
    assert found.cost == pytest.approx(least, rel=2e-3)
    assert found.cost >= least * (1 - 1e-6)
    assert ((found.actions >= BOX.low) & (found.actions <= BOX.high)).all()


def quadratic_choices(horizon, coupling):
    """Return a cost of each choice, and with weight `coupling` of successive ones, without order between them."""
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(horizon, 3, 3, generator=generator, dtype=torch.float64)
    alone = torch.rand(horizon, 3, generator=generator, dtype=torch.float64)

    def cost(actions):
        given = actions.double()
        before = torch.cat([given[:, :1], given[:, :-1]], dim=1)
        together = torch.einsum("nha,hab,nhb->n", before, pairs, given)
        return torch.einsum("nha,ha->n", given, alone) + coupling * together

    return cost


@pytest.mark.parametrize(
    ("method", "candidates", "coupling"), [("cem", 300, 0.2), ("mppi", 300, 0.2), ("cem", 4000, 1.0)]
)
def test_choices_are_those_of_brute_force(method, candidates, coupling):
    """3⁷ = 2,187 sequences: sampled by 300, and tried one by one where there is room for all."""
    cost = quadratic_choices(7, coupling)
    every = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=7)))]
    costs = cost(every)
    found = search(cost, CHOICES, Search(7, candidates, 12), method)
    assert found.actions.tolist() == every[int(costs.argmin())].tolist()
    assert found.cost == pytest.approx(float(costs.min()))
    assert found.tried == (2187 if candidates > 2187 else 12 * 300)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_one_search_and_another_seed_another(method):
    first, again = solved(method, [0.6, -0.4], iterations=3), solved(method, [0.6, -0.4], iterations=3)
    assert torch.equal(first.actions, again.actions)
    assert first.history == again.history
    assert not torch.equal(first.actions, solved(method, [0.6, -0.4], seed=1, iterations=3).actions)


@pytest.mark.parametrize("method", METHODS)
def test_the_least_cost_never_rises_and_the_start_is_tried(method):
    goal = [0.6, -0.4]
    best = solved(method, goal)
    assert list(best.history) == sorted(best.history, reverse=True)
    assert len(best.history) == (150 if method == "gradient" else 12)
    assert solved(method, goal, iterations=1, start=best.actions).cost <= best.cost * (1 + 1e-5)


def test_a_random_search_of_as_many_tries_is_worse():
    cost, _ = problem([0.6, -0.4])
    once = search(cost, BOX, Search(HORIZON, 4800, 1))
    assert solved("cem", [0.6, -0.4]).cost < once.cost / 10


def test_costs_that_are_no_numbers_are_never_chosen():
    def holes(actions):
        found = problem([0.6, -0.4])[0](actions)
        return torch.where(actions[:, 0, 0] > 0, torch.nan, found)

    for method in ("cem", "mppi"):
        found = search(holes, BOX, Search(HORIZON, 100, 5), method)
        assert math.isfinite(found.cost)
        assert found.actions[0, 0] <= 0
    with pytest.raises(UserError, match="no predicted cost is a finite number"):
        search(lambda actions: torch.full((len(actions),), torch.nan), BOX, Search(2, 10, 2))


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_an_iteration_without_a_finite_cost_changes_nothing(method):
    """The second of three: the search goes on from what the first one found."""
    seen = []

    def cost(actions):
        seen.append(actions)
        found = actions.square().sum((1, 2))
        return torch.full_like(found, torch.nan) if len(seen) == 2 else found

    found = search(cost, BOX, Search(2, 50, 3), method)
    assert all(bool(actions.isfinite().all()) for actions in seen)
    assert found.history[0] == found.history[1] >= found.history[2] == found.cost


def test_choices_have_no_gradient():
    with pytest.raises(UserError, match="method gradient needs continuous actions"):
        descend(lambda actions: (actions, actions), CHOICES, Search(2, 4, 2))


def test_samples_are_within_bounds_and_a_bound_has_the_weight_beyond_it():
    """A std of half the width leaves 16 % beyond each end of a normal distribution."""
    drawn = Gaussian.within(BOX.low, BOX.high, 2, None).sample(20_000, torch.Generator().manual_seed(0))
    assert ((drawn >= BOX.low) & (drawn <= BOX.high)).all()
    for end in (BOX.low, BOX.high):
        assert (drawn == end).double().mean(dim=(0, 1)).tolist() == pytest.approx([0.1587] * 2, abs=0.01)


def test_choices_are_sampled_with_their_chances_and_no_chance_dies():
    chances = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    drawn = Categorical(chances).sample(20_000, torch.Generator().manual_seed(0))
    assert drawn.sum(dim=2).eq(1).all()
    assert drawn.double().mean(dim=0)[0].tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    alone = Categorical(chances).refit(drawn[:1], torch.ones(1, dtype=torch.float64)).chances
    assert alone.sum() == pytest.approx(1.0)
    assert alone.min() == pytest.approx(0.05 / 3)
