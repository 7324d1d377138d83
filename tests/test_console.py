from __future__ import annotations

import time

from iwm_fast.console import counting


def test_without_a_terminal_lines_come_now_and_then_with_the_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with counting() as count:
        for second in range(0, 31, 3):
            now[0] = 100.0 + second
            count("linear probe", 10 + 10 * second, 310)
            count("files", second, None)
    assert capsys.readouterr().err.splitlines() == [
        "linear probe: 130 of 310, 0:00:18 left",
        "files: 12",
        "linear probe: 250 of 310, 0:00:06 left",
        "files: 24",
        "linear probe: 310 of 310",
    ]
