from __future__ import annotations

import json

import pytest

from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.errors import UserError


def lines(run):
    return [json.loads(line)["file"] for line in (run / "bad_samples.jsonl").read_text().splitlines()]


def test_each_file_is_written_once_by_all_ranks_and_starts_together(tmp_path):
    first, second = (BadSamples(1000, 0.01, tmp_path) for _ in range(2))
    first.add("/a.jpg", "torn", 0, 1)
    first.add("/a.jpg", "torn", 1, 1)
    second.add("/a.jpg", "torn", 0, 1)
    second.add("/b.jpg", "empty", 0, 2)
    resumed = BadSamples(1000, 0.01, tmp_path)
    resumed.add("/b.jpg", "empty", 3, 2)
    resumed.add("/c.jpg", "empty", 3, 3)
    assert lines(tmp_path) == ["/a.jpg", "/b.jpg", "/c.jpg"]
    assert (len(first), len(second), len(resumed)) == (1, 2, 2)


def test_the_limit_is_about_the_bad_files_of_all_ranks(tmp_path):
    ranks = [BadSamples(100, 0.02, tmp_path) for _ in range(2)]
    for rank in ranks:
        rank.tried(list(range(50)))
    ranks[0].add("/a.jpg", "torn", 0, 1)
    ranks[0].add("/b.jpg", "torn", 0, 2)
    ranks[0].check()
    ranks[1].add("/c.jpg", "torn", 0, 3)
    with pytest.raises(UserError, match="3 of 100 files"):
        ranks[1].check()


def test_the_limit_waits_for_twenty_files_or_all():
    few = BadSamples(1000, 0.0)
    few.add("/a.jpg", "torn", 0, 1)
    few.tried(list(range(19)))
    few.check()
    few.tried([30])
    with pytest.raises(UserError, match="1 of 1000 files"):
        few.check()


def test_torn_lines_of_a_killed_run_do_no_harm(tmp_path):
    (tmp_path / "bad_samples.jsonl").write_bytes(b'{"file": "/a.jpg", "reason": "x"}\n{"file": "/b')
    bad = BadSamples(10, 0.5, tmp_path)
    bad.add("/a.jpg", "torn", 0, 1)
    bad.add("/b.jpg", "torn", 0, 2)
    last = (tmp_path / "bad_samples.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["file"] == "/b.jpg"
