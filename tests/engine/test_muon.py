"""Muon against its definition by singular values in float64, and against PyTorch's."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import small_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.actions.external import action_dim
from iwm_fast.cost.memory import layout_of
from iwm_fast.cost.muon import fullest_rank, matrices_of, matrix_flops, owners
from iwm_fast.engine.muon import FiniteMuon, orthogonal
from iwm_fast.engine.optimizer import MOMENTS, parameter_groups
from iwm_fast.models.iwm import IWM

SIZES = [(7, 5), (5, 7), (7, 5), (4, 4), (1, 6), (6, 1)]


def polynomial(matrix: Tensor) -> Tensor:
    """The iterations written out on the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


def muon(weight: Tensor, grads: list[Tensor], lr: float, decay: float) -> Tensor:
    w, m = weight.double(), torch.zeros_like(weight).double()
    for grad in grads:
        m = 0.95 * m + 0.05 * grad.double()
        w = w - lr * decay * w - lr * 0.2 * max(w.shape) ** 0.5 * polynomial(0.05 * grad.double() + 0.95 * m)
    return w


def matrices(seed: int, sizes: list[tuple[int, ...]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def stepped(kind: type | partial, begin: list[Tensor], grads: list[list[Tensor]], **options: object) -> list[Tensor]:
    weights = [nn.Parameter(w.clone()) for w in begin]
    optimizer = kind([{"params": weights, "decayed": True, "weight_decay": 0.1}], lr=0.02, **options)
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    return [w.detach() for w in weights]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), count=st.integers(1, 3), seed=st.integers(0, 99),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
)  # fmt: skip
def test_orthogonal_maps_each_singular_value_by_the_polynomial(
    rows: int, columns: int, count: int, seed: int, size: float
) -> None:
    given_matrices = size * torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    found = orthogonal(given_matrices, torch.float32).double()
    torch.testing.assert_close(found, torch.stack([polynomial(m) for m in given_matrices]), rtol=1e-3, atol=1e-3)


def test_singular_values_become_about_1_also_in_bf16_and_zeros_stay() -> None:
    found = orthogonal(torch.stack(matrices(0, [(96, 64)] * 3)), torch.bfloat16).double()
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.6
    assert singular.max() < 1.25
    assert not orthogonal(torch.zeros(2, 3, 4), torch.float32).any()


def test_muon_is_its_definition_for_matrices_of_all_shapes() -> None:
    begin, grads = matrices(0), [matrices(1 + t) for t in range(4)]
    found = stepped(FiniteMuon, begin, grads)
    for place, weight in enumerate(found):
        expected = muon(begin[place], [step[place] for step in grads], 0.02, 0.1)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_it_is_pytorchs_muon_that_matches_adamws_size() -> None:
    """PyTorch multiplies in bf16, ours here too; they add in another order."""
    begin, grads = matrices(0, [(48, 32)] * 2), [matrices(1 + t, [(48, 32)] * 2) for t in range(3)]
    found = stepped(partial(FiniteMuon, working=torch.bfloat16), begin, grads)
    weights = [nn.Parameter(w.clone()) for w in begin]
    theirs = torch.optim.Muon(weights, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        theirs.step()
    for weight, other, before in zip(found, weights, begin, strict=True):
        assert (weight - other.detach()).norm() < 0.02 * (weight - before).norm()


def test_biases_and_norms_get_adamws_update_and_a_matrix_has_no_second_moment() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
    begin = [p.detach().clone() for p in model.parameters()]
    optimizer = FiniteMuon(parameter_groups(model), lr=0.02, betas=(0.9, 0.95))
    plain = [nn.Parameter(w.clone()) for w in begin[1:]]
    adamw = torch.optim.AdamW(plain, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for mine, parameter in zip(plain, list(model.parameters())[1:], strict=True):
            mine.grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
    for mine, parameter in zip(plain, list(model.parameters())[1:], strict=True):
        torch.testing.assert_close(parameter, mine, rtol=1e-5, atol=1e-6)
    weight = optimizer.state[model[0].weight]
    assert weight[MOMENTS[0]].any()
    assert not weight[MOMENTS[1]].any()


def test_planned_flops_are_those_that_torch_counts(tiny_images) -> None:
    config = small_config(tiny_images, train__optimizer="muon")
    model = IWM(config.model, action_dim(config.actions))
    optimizer = FiniteMuon(parameter_groups(model), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    flops, elements = fullest_rank(matrices_of(layout_of(config)), 1)
    assert counter.get_total_flops() == flops
    assert elements == sum(p.numel() for p in optimizer.param_groups[0]["params"] if p.ndim == 2)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(2, 3), (8, 8), (16, 4), (64, 64)]), min_size=1, max_size=20),
    world=st.integers(1, 9),
)
def test_no_rank_has_a_matrix_more_than_another(shapes: list[tuple[int, int]], world: int) -> None:
    ranks = owners(tuple(shapes), world)
    loads = [sum(matrix_flops(s) for s, r in zip(shapes, ranks, strict=True) if r == rank) for rank in range(world)]
    assert fullest_rank(tuple(shapes), world)[0] == max(loads)
    assert max(loads) - min(loads) <= max(map(matrix_flops, shapes))
