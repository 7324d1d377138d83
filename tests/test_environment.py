"""The environment recorded in a result."""

import subprocess
from pathlib import Path

import pytest

from iwm_fast.environment import environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_a_result_of_a_checkout_names_its_commit():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert environment()["commit"] in (head.stdout.strip(), f"{head.stdout.strip()}-modified")
