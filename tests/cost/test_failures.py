"""Expected failures and checkpoints: closed forms against a simulation of the same job, and what the plan says."""

import math

import numpy as np
import pytest

from iwm_fast.cost.failures import (
    GPU_HOURS,
    Checkpoint,
    Failures,
    Interval,
    daly,
    expected_loss,
    expected_seconds,
    young,
)


def checkpoint(delay=5.0, durable=0.0, restart=60.0) -> Checkpoint:
    return Checkpoint(10**9, delay, durable, restart)


def simulated(work: float, one: Checkpoint, mean: float, segments: int, rng) -> tuple[float, float]:
    """(seconds, seconds in restarts) of a job that ends when its last checkpoint is whole on the disk."""
    segment = max(work + one.delay_s, one.durable_s)
    saved, seconds, restarts = 0, 0.0, 0.0
    while True:
        failure, ending = rng.exponential(mean), (segments - saved) * segment + one.durable_s
        if failure >= ending:
            return seconds + ending, restarts
        seconds += failure
        saved += max(0, math.floor((failure - one.durable_s) / segment))
        while (again := rng.exponential(mean)) < one.restart_s:
            seconds, restarts = seconds + again, restarts + again
        seconds, restarts = seconds + one.restart_s, restarts + one.restart_s


@pytest.mark.parametrize("mean", [300.0, 2_000.0])
@pytest.mark.parametrize(
    "one",
    [checkpoint(), checkpoint(durable=40.0), checkpoint(durable=130.0), checkpoint(restart=250.0)],
    ids=["at once", "written beside the steps", "writing longer than the interval", "long restart"],
)
def test_the_expected_loss_is_that_of_simulated_jobs(one, mean):
    """Within four standard errors of 200 jobs, and the seconds of their last checkpoint."""
    rng, work, segments = np.random.default_rng(7), 100.0, 200
    jobs = np.array([simulated(work, one, mean, segments, rng) for _ in range(200)])
    took, error = jobs.mean(0), jobs.std(0) / math.sqrt(len(jobs))
    expected = segments * expected_seconds(work, one, mean)
    assert took[0] == pytest.approx(expected, abs=4 * error[0] + 2 * one.durable_s)
    loss = expected_loss(work, one, mean)
    assert loss.total == pytest.approx(1 - segments * work / expected)
    assert 0.02 < loss.total < 0.9
    assert loss.restart * expected == pytest.approx(took[1], abs=4 * error[1] + 0.01 * expected)
    waits = max(one.delay_s, one.durable_s - work)
    assert loss.writing * expected == pytest.approx(segments * waits)


@pytest.mark.parametrize("delay", [0.1, 5.0, 60.0])
@pytest.mark.parametrize("durable", [0.0, 50.0])
def test_daly_s_interval_is_the_minimum_of_the_expected_time(delay, durable):
    """Of a fine grid of intervals none takes 0.1 % less time per second of work; half and double take more."""
    one, mean = checkpoint(delay, durable, 300.0), 5_000.0

    def cost(work):
        return expected_seconds(work, one, mean) / work

    best = max(daly(delay, mean), durable)
    grid = np.geomspace(max(durable, 1.0), 20_000, 2_000)
    assert cost(best) <= min(map(cost, grid)) * 1.001
    assert cost(best) < min(cost(2 * best), cost(best / 2) if best / 2 > durable else math.inf)


def test_daly_is_young_where_checkpoints_are_short_and_the_mean_where_they_are_long():
    assert daly(1.0, 1e6) == pytest.approx(young(1.0, 1e6), rel=2e-3) == pytest.approx(math.sqrt(2e6), rel=2e-3)
    # Daly's formula by hand for δ = 200, M = 10,000: 2,000 · (1 + 0.1/3 + 0.01/9) − 200.
    assert daly(200.0, 1e4) == pytest.approx(2_000 * (1 + 0.1 / 3 + 0.01 / 9) - 200)
    assert daly(20.0, 10.0) == 10.0


def test_a_checkpoint_that_is_whole_at_once_is_daly_s_model():
    one, mean, work = checkpoint(5.0, 0.0, 60.0), 400.0, 100.0
    assert expected_seconds(work, one, mean) == pytest.approx(
        mean * math.exp(60 / mean) * (math.exp((work + 5) / mean) - 1)
    )


def test_the_default_is_llama_3_s_interruptions():
    """54 days of 16,384 GPUs over 419 interruptions: one in 3.1 hours for all of them."""
    assert pytest.approx(50_677, abs=1) == GPU_HOURS
    whole = Interval.of(checkpoint(), Failures(), 16_384, 10**6, 1.0)
    assert whole.mean_s / 3600 == pytest.approx(54 * 24 / 419)


def test_a_checkpoint_is_weights_two_moments_and_the_ema_in_fp32():
    one = Checkpoint.of(400, 300, 8, Failures(storage=10.0, restart_s=7.0))
    assert one.size == 4 * (3 * 400 + 300)
    assert one.durable_s == one.size / 10
    assert one.restart_s == 7 + one.durable_s
    assert Checkpoint.of(400 * 10**6, 0, 8, Failures()).delay_s > Checkpoint.of(400 * 10**6, 0, 64, Failures()).delay_s


def test_the_interval_is_whole_steps_no_shorter_than_the_writing_and_no_longer_than_the_run():
    steps = 1_000
    usual = Interval.of(checkpoint(1.0, 2.0), Failures(1_000), 8, steps, 10.0)
    assert usual.every_steps == round(daly(1.0, 1_000 / 8 * 3600) / 10)
    assert usual.expected == pytest.approx(usual.hours * 8 / 1_000)
    assert Interval.of(checkpoint(1.0, 20_000.0), Failures(1_000), 8, 5_000, 10.0).every_steps == 2_000
    short = Interval.of(checkpoint(1.0), Failures(10**9), 1, steps, 10.0)
    assert short.every_steps == steps
    assert short.loss.rework < 1e-5


def test_a_job_that_fails_before_it_restarts_never_ends():
    lost = Interval.of(checkpoint(restart=300.0), Failures(0.01), 64, 10**6, 1.0)
    assert (lost.hours, lost.expected, lost.loss.total) == (None, None, 1.0)
    assert math.isinf(expected_seconds(1e9, checkpoint(), 10.0))
