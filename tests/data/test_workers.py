from __future__ import annotations

import os
import signal
from itertools import chain

import pytest

from iwm_fast.data.workers import in_order
from iwm_fast.errors import UserError


def _double(given, span):
    if span[0] == given:
        raise UserError("a message")
    if span[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return [2 * i for i in range(*span)]


@pytest.mark.parametrize("processes", [1, 3])
def test_helpers_answer_in_order_and_pass_errors_on(processes):
    spans = [(i, i + 3) for i in range(0, 30, 3)]
    assert list(chain(*in_order(_double, 100, spans, processes))) == list(range(0, 60, 2))
    with pytest.raises(UserError, match="a message"):
        list(in_order(_double, 12, spans, processes))


def test_a_helper_that_dies_is_one_line():
    with pytest.raises(UserError, match="a worker process died"):
        list(in_order(_double, 100, [(0, 3), (-1, 3), (3, 6)], 2))
