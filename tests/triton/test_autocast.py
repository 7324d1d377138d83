"""Autocast around an operator on Triton does what its docstring says and nothing else."""

from __future__ import annotations

import pytest
from operator_cases import CASES, check_autocast, check_compiled_autocast


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_cast_by_the_rule_and_nothing_else_changes(name, device):
    check_autocast(name, device, "triton")


@pytest.mark.parametrize("name", ["conditioned_mlp", "predictor_input", "residual_norm", "stopgrad_l2"])
def test_compiled_under_autocast_it_is_the_same(name, device):
    check_compiled_autocast(name, device, "triton")
