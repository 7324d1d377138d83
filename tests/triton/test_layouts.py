"""Every operator on Triton gives the same result for views of any layout as for contiguous copies."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, VIEWS, check_layout


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CASES)
def test_every_argument_and_incoming_gradient_may_be_a_view(name, view, device):
    case = CASES[name]()
    check_layout(case, view, {*case.tensors, "incoming"}, torch.float32, device, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CASES)
def test_each_argument_alone_may_be_a_view(name, view, dtype, device):
    case = CASES[name]()
    for argument in (*case.tensors, "incoming"):
        check_layout(case, view, {argument}, dtype, device, "triton")
