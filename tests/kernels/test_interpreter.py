"""Run tests/triton in Triton's interpreter (see tests/interpreter.py)."""

import pytest
from interpreter import PARTS


@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_pass_their_tests_in_the_interpreter(part, in_interpreter):
    in_interpreter(part)
