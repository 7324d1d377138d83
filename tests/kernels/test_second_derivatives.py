"""Second derivatives are right or refused: a constant in their place would be a wrong number in silence."""

from __future__ import annotations

import pytest
from operator_cases import CASES, check_second_derivatives


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    check_second_derivatives(name, "cpu", "reference")
