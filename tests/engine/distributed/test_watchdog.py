"""A rank that reads gigabytes in one place makes progress, and is not taken for one that hangs."""

from __future__ import annotations

import torch

from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.distributed.watchdog import Liveness
from iwm_fast.long_work import note_progress


def test_progress_of_long_work_is_noted_while_the_rank_is_watched_and_is_no_move_to_another_place():
    live = Liveness(Ranks(0, 1, 0, 1, torch.device("cpu")), 60.0)
    with live.watching():
        live.at("listing of the data")
        before, moves = live._moved_at, live._moves
        note_progress()
        assert live._moved_at > before
        assert live._moves == moves
    noted = live._moved_at
    note_progress()
    assert live._moved_at == noted
