"""Names sorted in a file are those of `sorted`, and take no memory."""

from __future__ import annotations

import os
import random
import tracemalloc

import pytest

from iwm_fast.data.sources import sorted_names
from iwm_fast.data.sources.sorted_names import SortedNames

NAMES = [
    os.fsdecode(b"latin\xe9.jpg"),
    "größe/1.jpg",
    "a/b.jpg",
    "a.jpg",
    "a-b/c.jpg",
    "line\nhere",
    "tab\there",
    "𝔸.jpg",
]


@pytest.mark.parametrize("held", [1, 3, 1000])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 257])
def test_they_are_those_of_sorted_whatever_is_held_in_memory(tmp_path, monkeypatch, held, count):
    monkeypatch.setattr(sorted_names, "_HELD", held)
    monkeypatch.setattr(sorted_names, "_BLOCK", 50)
    made = (NAMES + [f"{number}/é{number}.jpg" for number in range(250)])[:count]
    random.Random(0).shuffle(made)
    found = SortedNames(iter(made), tmp_path)
    assert list(found) == sorted(made)
    assert len(found) == count
    assert [found[place] for place in range(count)] == sorted(made)
    assert found[-5:] == sorted(made)[-5:]
    assert list(found.only(lambda name: "/" in name)) == [name for name in sorted(made) if "/" in name]
    with pytest.raises(IndexError):
        found[count]
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(sorted_names, "_HELD", 250)
    monkeypatch.setattr(sorted_names, "_BLOCK", 256)
    taken = {}
    for count in (1_000, 10_000):
        tracemalloc.start()
        names = SortedNames((f"{number * 7919 % count:012d}.jpg" for number in range(count)), tmp_path)
        assert sum(1 for _ in names) == count
        taken[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert taken[10_000] < taken[1_000] + 200_000  # a block of each of 36 more parts; 9,000 texts are 0.6 MB
