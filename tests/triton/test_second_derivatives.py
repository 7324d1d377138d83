"""Second derivatives on Triton are right or refused."""

from __future__ import annotations

import pytest
from operator_cases import check_second_derivatives


@pytest.mark.parametrize(
    "name", ["conditioned_mlp without either", "stopgrad_l2", "residual_norm", "predictor_input", "sigreg_sums"]
)
def test_second_derivatives_are_right_or_refused(name, device):
    check_second_derivatives(name, device, "triton")
