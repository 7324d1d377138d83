import pytest
from hypothesis import given
from hypothesis import strategies as st

from iwm_fast.config import TrainConfig
from iwm_fast.engine.schedules import Schedules


def test_learning_rate_warms_up_linearly_then_follows_a_cosine_to_its_end():
    schedules = Schedules(TrainConfig(lr=1e-3, lr_start=0.2, lr_final=1e-3, warmup=10), total=110)
    assert schedules.lr(0) == pytest.approx(2e-4)
    assert schedules.lr(5) == pytest.approx(6e-4)
    assert schedules.lr(10) == pytest.approx(1e-3)
    assert schedules.lr(60) == pytest.approx((1e-3 + 1e-6) / 2)
    assert schedules.lr(110) == pytest.approx(1e-6)


def test_learning_rate_scales_with_the_global_batch_only_when_asked():
    assert Schedules(TrainConfig(lr=1e-3, global_batch=512), 10).peak_lr == 1e-3
    assert Schedules(TrainConfig(lr=1e-3, global_batch=512, lr_batch=2048), 10).peak_lr == pytest.approx(2.5e-4)


@given(step=st.integers(0, 5000), total=st.integers(1, 4000), warmup=st.integers(0, 300))
def test_every_value_stays_within_its_ends(step, total, warmup):
    train = TrainConfig(warmup=warmup, ema=(0.99, 1.0), weight_decay=(0.04, 0.4))
    schedules = Schedules(train, total)
    assert 0 < schedules.lr(step) <= train.lr
    assert 0.99 <= schedules.ema(step) <= 1.0
    assert 0.04 <= schedules.weight_decay(step) <= 0.4


def test_momentum_and_weight_decay_reach_their_ends():
    schedules = Schedules(TrainConfig(ema=(0.996, 1.0), weight_decay=(0.04, 0.4)), 100)
    assert (schedules.ema(0), schedules.ema(100)) == (0.996, 1.0)
    assert (schedules.weight_decay(0), schedules.weight_decay(100)) == (0.04, 0.4)
