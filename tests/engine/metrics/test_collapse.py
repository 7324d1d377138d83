import numpy as np
import pytest
import torch

from iwm_fast.config import load_config, packaged_config
from iwm_fast.engine.metrics.collapse import CollapseWatch, rank_me, spread
from iwm_fast.engine.metrics.energy import SHARES


def test_rank_me_equals_the_entropy_of_the_singular_values():
    x = np.random.default_rng(0).normal(size=(300, 24)) * np.geomspace(1, 1e-3, 24)
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    assert rank_me(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_a_collapsed_representation_has_rank_one_and_no_spread():
    x = torch.ones(100, 16)
    assert rank_me(x) == pytest.approx(1.0, abs=1e-4)
    assert spread(x) == 0.0


def test_nothing_at_all_is_not_an_error():
    assert rank_me(torch.zeros(10, 4)) >= 0.0


WORDS = {
    "energy_mean": "the mean of all",
    "energy_position": "what the position of a patch explains",
    "energy_image": "what the image explains",
    "energy_rest": "what differs from token to token",
}


def watched(values, *overrides):
    """Lines of a watch over records with these values of RankMe, at steps 10, 20 and so on, losses falling."""
    config = load_config(packaged_config("vit_tiny_p4_32.yaml"), ["data.root=x", "log.rank_me_floor=0.05", *overrides])
    watch = CollapseWatch(config)  # of width 128: the floor is 6.4, recovered is 9.6
    records = [{"step": 10 * i, "rank_me": v, "loss": 1 / i} for i, v in enumerate(values, start=1)]
    return [watch.look(record) for record in records]


def test_collapse_is_reported_once_per_episode_and_again_after_it_recovered():
    falls = [30.0, 40.0, 6.0, 5.0, 7.0, 6.0, 3.0]  # 7.0 is above the floor, and no recovery
    recovers = [20.0, 21.0, 22.0]
    said = watched([*falls, *recovers, 2.0, 1.0])
    assert [i for i, line in enumerate(said) if line] == [2, 10]
    assert "RankMe fell from 40.0 at step 20 to 6.0 of 128" in said[2]
    assert "loss from 0.5 to 0.333" in said[2]
    assert "RankMe fell from 22.0 at step 100 to 2.0 of 128" in said[10]


def test_a_value_that_comes_back_for_a_moment_starts_no_second_episode():
    assert [line is not None for line in watched([30.0, 5.0, 20.0, 20.0, 5.0, 20.0, 5.0])] == [
        False, True, False, False, False, False, False,
    ]  # fmt: skip


def test_collapse_names_keys_that_help_and_that_this_run_can_turn():
    (line,) = watched([3.0])
    assert "RankMe is 3.0 of 128" in line
    assert "train.ema" in line
    assert "model.target=ema" not in line
    for key in ("train.lr", "train.warmup", "model.regularizer.kind"):
        assert key in line
    (shared,) = watched([3.0], "model.target=shared")
    assert "model.target=ema" in shared
    assert "train.ema" not in shared


@pytest.mark.parametrize("name", SHARES)
def test_the_warning_names_the_part_of_the_energy_that_grew(name):
    config = load_config(packaged_config("vit_tiny_p4_32.yaml"), ["data.root=x", "log.rank_me_floor=0.05"])
    even = dict.fromkeys(SHARES, 0.25)
    healthy = {"step": 1, "loss": 1.0, "rank_me": 30.0} | even
    sick = {"step": 2, "loss": 0.1, "rank_me": 3.0} | dict.fromkeys(SHARES, 0.07) | {name: 0.79}
    watch = CollapseWatch(config)
    assert watch.look(healthy) is None
    line = watch.look(sick)
    assert f"{WORDS[name]} grew from 25% to 79%" in line
    assert f"79% of the tokens' energy is {WORDS[name]}" in CollapseWatch(config).look(sick)
    unknown = CollapseWatch(config).look(sick | {"energy_rest": float("nan")})
    assert "energy" not in unknown


def partial(*means):
    """Lines of a watch over records of a healthy RankMe with these shares of the mean, at steps 1, 2 and so on."""
    watch = CollapseWatch(load_config(packaged_config("vit_tiny_p4_32.yaml"), ["data.root=x"]))
    rest = {name: 0.01 for name in SHARES if name != "energy_mean"}
    records = enumerate(means, start=1)
    return [watch.look({"step": i, "loss": 1 / i, "rank_me": 11.0, "energy_mean": m} | rest) for i, m in records]


def test_a_mean_that_takes_over_is_a_partial_collapse_reported_once():
    said = partial(0.43, 0.5, 0.92, 0.95, 0.75, 0.92, 0.6, 0.6, 0.6, 0.9)
    assert [i for i, line in enumerate(said) if line] == [2, 9]
    assert "RankMe fell from 11.0 at step 1 to 11.0 of 128 (above 6.4, log.rank_me_floor, but the mean has" in said[2]
    assert "the mean of all grew from 43% to 92%" in said[2]


def test_images_that_are_nearly_equal_from_the_start_are_no_collapse():
    assert partial(0.95, 0.96, 0.97, 0.95) == [None] * 4
    assert partial(float("nan"), 0.9, 0.95) == [None] * 3


def test_a_record_of_measurements_alone_or_a_rank_that_is_no_number_reports_nothing():
    assert CollapseWatch(load_config(packaged_config("vit_tiny_p4_32.yaml"), ["data.root=x"])).look({"step": 1}) is None
    assert watched([float("nan"), 30.0]) == [None, None]
