"""Every operator's reference gives the same result for views of any layout as for contiguous copies."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, VIEWS, check_layout


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CASES)
def test_each_argument_and_incoming_gradient_may_be_a_view(name: str, view: str) -> None:
    case = CASES[name]()
    for argument in (*case.tensors, "incoming"):
        check_layout(case, view, {argument}, torch.float32, "cpu", "reference")
