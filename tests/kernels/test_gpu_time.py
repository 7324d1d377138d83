"""GPU timing on a simulated GPU: a queue that it works off while the host continues."""

from __future__ import annotations

import pytest

from iwm_fast.kernels._tuning.gpu_time import gpu_seconds

FOREVER = float("inf")


class Gpu:
    """A GPU with its queue, and the host's clock. The GPU starts an entry when all entries before it are done."""

    def __init__(self, longest_spin=FOREVER):
        self.host = self.free = 0.0
        self.spins = []
        self.order = []
        self.longest_spin = longest_spin

    def launch(self, host, seconds):
        """Launch work that takes the host and then the GPU this long."""
        self.host += host
        self.free = max(self.free, self.host) + seconds
        self.order.append("call")

    def spin(self, seconds):
        self.spins.append(seconds)
        self.free = max(self.free, self.host) + min(seconds, self.longest_spin)
        self.order.append("spin")

    def event(self):
        return Mark(self)


class Mark:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free, self.gpu.host)
        self.gpu.order.append("event")

    def query(self):
        self.gpu.order.append("query")
        return self.at <= self.gpu.host

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)
        self.gpu.order.append("wait")

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


def timed(gpu, host, seconds, launches=1, repeats=5, warm_up=2):
    numbers = []

    def call(number):
        numbers.append(number)
        for _ in range(launches):
            gpu.launch(host, seconds)

    return gpu_seconds(call, repeats, warm_up, gpu), numbers


@pytest.mark.parametrize("host", [0.0, 1e-6, 5e-5, 1e-3, 2e-2], ids="host {} s".format)
@pytest.mark.parametrize("launches", [1, 4])
def test_the_hosts_time_does_not_count_however_slow_it_is(host, launches):
    found, _ = timed(Gpu(), host, 1e-5, launches)
    assert found == pytest.approx([launches * 1e-5] * 5)


def test_without_a_full_queue_the_host_would_be_measured():
    """Why there is a spin: if it is cut short, the gaps between launches are measured."""
    found, _ = timed(Gpu(longest_spin=0.0), 1e-3, 1e-5, launches=4)
    assert found == pytest.approx([4 * 1e-3 + 1e-5] * 5)


def test_a_call_is_between_its_events_behind_a_spin_and_looked_at_before_the_host_waits():
    gpu = Gpu()
    timed(gpu, 1e-6, 1e-5, repeats=1, warm_up=0)
    assert gpu.order == ["spin", "event", "call", "event", "query", "wait"]


def test_a_spin_that_ended_too_early_is_doubled_and_its_call_repeated():
    gpu = Gpu()
    _, numbers = timed(gpu, 5e-4, 1e-5, repeats=2, warm_up=0)
    assert gpu.spins == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4, 8e-4])
    assert numbers == [0, 1, 2, 3, 4]


def test_calls_that_warm_up_are_slow_for_reasons_of_their_own():
    """They compile, so they do not determine the spin."""
    gpu = Gpu()
    pauses = iter([3.0, 1.0, 0, 0, 0])
    found = gpu_seconds(lambda _: gpu.launch(next(pauses), 1e-5), 3, 2, gpu)
    assert found == pytest.approx([1e-5] * 3)
    assert set(gpu.spins) == {1e-4}


def test_a_call_that_waits_for_the_gpu_is_timed_without_a_spin():
    """No spin outlasts it, so it would be repeated forever."""
    gpu = Gpu()

    def call(_):
        gpu.launch(1e-3, 1e-5)
        gpu.host = gpu.free

    found = gpu_seconds(call, 3, 1, gpu)
    assert found == pytest.approx([1e-3 + 1e-5] * 3)
    assert max(gpu.spins) <= 0.2
    assert len(gpu.spins) < 20
