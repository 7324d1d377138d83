"""The choice of DALI's decoder, by processes that may crash. On the CPU both paths are DALI's own CPU decoders."""

from __future__ import annotations

import sys

import pytest

from iwm_fast.data.views.gpu_decoder import GpuDecoder, main, probe
from iwm_fast.errors import UserError

# Acts as the probe of one path with a given outcome; for another path it succeeds.
_ENDS = """
import os, signal, sys
path = sys.argv[1]
if path in {refused}:
    {how}
"""


def _command(how: str, *refused: str) -> list[str]:
    return [sys.executable, "-c", _ENDS.format(refused=set(refused), how=how)]


@pytest.mark.parametrize("path", ["image_slice", "image"])
def test_both_paths_give_the_region_that_pillow_decodes(path):
    assert main([path]) == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("raise RuntimeError('no engine')", "RuntimeError: no engine"),
        ("print('7.00 levels from Pillow'); sys.exit(1)", "7.00 levels from Pillow"),
    ],
    ids=["crash", "error", "wrong pixels"],
)
def test_a_path_that_does_not_work_is_left_for_the_slower_one_with_its_reason(how, said):
    found = probe(0, _command(how, "image_slice"))
    assert found.path == "image"
    assert said in (found.refused or "")


def test_the_faster_path_is_taken_where_it_works():
    assert probe(0, _command("pass")) == GpuDecoder("image_slice")


def test_where_no_path_works_one_line_says_so_and_what_to_do():
    with pytest.raises(UserError, match=r"image_slice: .*signal 11.*image: .*signal 11.*data\.device=cpu"):
        probe(0, _command("os.kill(os.getpid(), signal.SIGSEGV)", "image_slice", "image"))
