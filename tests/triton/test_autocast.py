"""Autocast around an operator on Triton does what the operator says it does, and nothing more."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, check_autocast, outcome


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_cast_by_the_rule_and_nothing_else_changes(name, device):
    check_autocast(name, device, "triton")


@pytest.mark.parametrize("name", ["conditioned_mlp", "predictor_input", "residual_norm", "stopgrad_l2"])
def test_compiled_under_autocast_it_is_the_same(name, device):
    case = CASES[name]()
    tensors = {k: t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for k, t in case.tensors.items()}
    compiled = type(case)(torch.compile(case.call, backend="aot_eager", fullgraph=True), tensors)
    found, expected = (
        outcome(one, tensors, forward=lambda: torch.autocast(device, torch.bfloat16), backend="triton")
        for one in (compiled, case)
    )
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        torch.testing.assert_close(found[key], value)
