from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from iwm_fast.data.views.cpu_views import CpuViews


@pytest.mark.parametrize("threads", [1, 3])
def test_its_threads_use_one_core_each_and_others_as_many_as_before(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    views = CpuViews(16, threads, geometric=False, sources=1, bases=True)
    inside = [views._pool.submit(torch.get_num_threads) for _ in range(8)]
    assert {one.result() for one in inside} == {1}
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(before)
    views.close()


def test_memory_is_taken_again_when_it_is_let_go_of_and_not_before():
    views = CpuViews(16, 1, geometric=False, sources=1, bases=True)
    first = views._memory.take(4, 3)
    place, part = first.data_ptr(), first[1:2].numpy()
    assert views._memory.take(4, 3).data_ptr() != place
    del first
    assert views._memory.take(4, 3).data_ptr() != place  # a row of it is still held
    del part
    smaller = views._memory.take(2, 3)
    assert smaller.data_ptr() == place
    assert smaller.shape == (2, 3)
    views.close()
