"""Playing a game does not change how its process is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("gymnasium", reason="gymnasium is not installed (the extra games)")
pytest.importorskip("pygame", reason="pygame is not installed (the extra games)")

TERMINATED = """
import os, signal
from iwm_fast.games.play import Game
from iwm_fast.games.recording import Recording
game = Game(Recording("MountainCarContinuous-v0", 1, 0, size=16))
game.reset(0)
os.kill(os.getpid(), signal.SIGTERM)
print("survived")
"""


def test_a_game_that_was_drawn_leaves_sigterm_as_it_was():
    """SDL would make it an event of its own, and no scheduler could stop a recording."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SDL_")}
    words = [sys.executable, "-c", TERMINATED]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=env, timeout=100)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr
