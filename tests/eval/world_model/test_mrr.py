from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import RAW, Collapsed, Deaf, Oracle, pictures, tiny_config, tiny_model

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import PredictorConfig
from iwm_fast.eval.stats import chance_mrr
from iwm_fast.eval.world_model.bank import jittered_views, make_bank
from iwm_fast.eval.world_model.distances import DISTANCES, TIE, euclidean, ties
from iwm_fast.eval.world_model.mrr import CONTROLS, bank_distances, mean_ranks, mean_reciprocal_rank

SPACE = ActionSpace()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=5), st.data())
def test_rank_is_the_mean_place_over_all_orders_of_equals(rows, data):
    distances = np.array(rows, dtype=float)
    truth = np.array([data.draw(st.integers(0, 6)) for _ in rows])
    for row, true, rank in zip(distances, truth, mean_ranks(distances, truth, 0.0), strict=True):
        places = [place for place, d in enumerate(sorted(row), start=1) if d == row[true]]
        assert rank == np.mean(places)


def test_distances_nearer_than_the_tie_are_equal_and_numbers_that_are_none_come_last():
    row = np.array([[1.0, 1.0 + 1e-9, 2.0, np.nan, np.nan]])
    assert mean_ranks(row, np.array([0]), 1e-6) == 1.5
    assert mean_ranks(row, np.array([0]), 0.0) == 1
    assert mean_ranks(row, np.array([3]), 1e-6) == 4.5
    assert mean_ranks(np.full((1, 4), np.nan), np.array([2]), 1e-6) == 2.5


def test_distances_keep_their_digits_when_points_are_near_and_far_from_the_origin():
    """‖a‖² + ‖b‖² − 2ab in fp32 would lose everything below 10⁻³ of the norm; here nothing near a tie is lost."""
    torch.manual_seed(0)
    a = 100 + torch.randn(5, 40_000)  # more than two slices
    b = a[[0, 3, 4]] + 1e-4 * torch.randn(3, 40_000)
    want = torch.stack([(a.double() - row.double()).norm(dim=1) for row in b], dim=1)
    torch.testing.assert_close(euclidean(a, b), want, rtol=0, atol=1e-3 * TIE * float(a[0].norm()))


def test_a_view_that_overflows_makes_no_tie_of_the_others():
    torch.manual_seed(0)
    points = torch.randn(16, 8)
    broken = torch.cat([points, torch.full((1, 8), torch.nan), torch.full((1, 8), torch.inf)])
    assert ties({"l2": broken}) == ties({"l2": points})
    assert ties({"l2": broken[16:]})["l2"] == 0.0
    whole, with_broken = (
        mean_ranks(euclidean(points[:4] + 3, bank).numpy(), np.arange(4), ties({"l2": bank})["l2"])
        for bank in (points, broken)
    )
    assert whole.tolist() == with_broken.tolist()


def test_oracle_scores_one_and_its_shuffled_predictions_do_not():
    result = mean_reciprocal_rank(Oracle(SPACE), RAW, SPACE, pictures(3), bank=32)
    for distance in DISTANCES:
        assert result.mrr("model", distance) == pytest.approx(1, abs=0.02)  # two actions may give the same picture
        assert result.mrr("shuffled", distance) < 0.3
    summary = result.summary()
    assert summary["h1"] > 0.97
    assert summary["h5"] == 1
    assert summary["mrr_interval"][0] <= summary["mrr"] <= summary["mrr_interval"][1]


def test_collapsed_model_scores_the_mean_rank_of_a_tie():
    """1 / 128.5 on a bank of 256, whatever the rounding of equal distances."""
    result = mean_reciprocal_rank(Collapsed(SPACE), RAW, SPACE, pictures(1), bank=256)
    for distance in DISTANCES:
        for what in ("model", *CONTROLS):
            assert result.mrr(what, distance) == pytest.approx(1 / 128.5, rel=1e-9)


def test_random_predictor_scores_the_analytic_chance():
    """H_256 / 256, whatever the target: 1 / rank of a rank uniform on 1 to 256."""

    class Guess(Oracle):
        def predict(self, z, action):
            generator = torch.Generator().manual_seed(int(action.abs().sum() * 1e6))
            return 128 + 60 * torch.randn(len(action), *z.shape[1:], generator=generator)

    result = mean_reciprocal_rank(Guess(SPACE), RAW, SPACE, pictures(8), bank=256)
    assert chance_mrr(256) == pytest.approx(0.0239, abs=5e-5)
    # The std of 1 / rank is 0.077; of the mean of 8 x 256 independent ones, 0.0017.
    assert result.mrr() == pytest.approx(chance_mrr(256), abs=4 * 0.0017)
    assert result.summary()["h1"] == pytest.approx(1 / 256, abs=4 * 0.0014)


def test_model_that_ignores_the_action_is_at_chance_exactly():
    """One ranking for all queries: each rank occurs once, so the mean of 1 / rank is H_n / n."""
    result = mean_reciprocal_rank(Deaf(SPACE), RAW, SPACE, pictures(2), bank=64)
    for what in ("model", *CONTROLS):
        # Equal pictures in the bank share a rank, which changes the mean a little.
        assert result.mrr(what) == pytest.approx(chance_mrr(64), rel=0.03)


@pytest.mark.parametrize("conditioning", ["none", "sequence", "feature", "block"])
@pytest.mark.parametrize("target", ["ema", "shared"])
def test_equals_ranking_by_brute_force(conditioning, target):
    config = tiny_config(
        target=target, predictor=PredictorConfig(depth=1, width=16, heads=2, conditioning=conditioning)
    )
    check_by_brute_force(config)


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_ranking_by_brute_force_with_the_mlp_predictor(normalize):
    predictor = PredictorConfig(kind="mlp", depth=2, width=16, conditioning="block")
    check_by_brute_force(tiny_config(normalize_target=normalize, predictor=predictor))


def check_by_brute_force(config):
    model, space = tiny_model(config)
    images = pictures(2)
    result = mean_reciprocal_rank(model, config, space, images, bank=11, queries=4, chunk=3)
    for i, image in enumerate(images):
        bank = make_bank(config.actions, space, i, 11)
        with torch.no_grad():
            targets = model.targets(jittered_views(image, bank.jitter)).double()
            z = model.encode(image[None], "context")
            for q, true in enumerate((1, 4, 6, 9)):
                answer = model.predict(z, torch.from_numpy(bank.actions[[true]]))[0].double()
                far = [float((answer - t).square().sum().sqrt()) for t in targets]
                rank = 1 + sum(d < far[true] - 1e-6 for d in far)
                assert result.ranks["l2"]["model"][i, q] == pytest.approx(rank, abs=0.5)
                pooled = torch.stack([torch.cosine_similarity(answer.mean(0), t.mean(0), dim=0) for t in targets])
                rank = 1 + int((pooled > pooled[true] + 1e-9).sum())
                assert result.ranks["cosine"]["model"][i, q] == pytest.approx(rank, abs=0.5)


def test_chunks_change_nothing():
    config = tiny_config()
    model, space = tiny_model(config)
    bank = make_bank(config.actions, space, 0, 16)
    with torch.inference_mode():
        whole, parts = (
            bank_distances(model, pictures(1)[0], bank, np.arange(16), normalize=True, chunk=chunk) for chunk in (64, 5)
        )
    for distance in DISTANCES:
        np.testing.assert_allclose(parts.answers[distance], whole.answers[distance], rtol=1e-4, atol=1e-5)


def test_result_repeats_and_leaves_model_and_random_state_alone():
    config = tiny_config()
    model, space = tiny_model(config)
    model.train()
    state = torch.get_rng_state()
    first = mean_reciprocal_rank(model, config, space, pictures(2), bank=16)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    second = mean_reciprocal_rank(model, config, space, pictures(2), bank=16)
    for distance, what in ((d, w) for d in DISTANCES for w in ("model", *CONTROLS)):
        assert np.array_equal(first.ranks[distance][what], second.ranks[distance][what])


def test_summary_states_the_protocol():
    config = tiny_config()
    model, space = tiny_model(config)
    calls = []
    found = mean_reciprocal_rank(
        model, config, space, pictures(3), bank=16, queries=5, progress=lambda *at: calls.append(at)
    )
    summary = found.summary()
    assert (summary["mrr_images"], summary["mrr_queries"], summary["mrr_bank"]) == (3, 5, 16)
    assert summary["mrr_chance"] == chance_mrr(16)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    for control in ("", "_shuffled", "_neutral", "_bypass"):
        assert 0 < summary[f"mrr{control}"] <= 1
        assert 0 <= summary[f"h1{control}"] <= summary[f"h5{control}_cosine"] + 1


def test_too_few_queries_or_images_are_refused():
    config = tiny_config()
    model, space = tiny_model(config)
    with pytest.raises(ValueError, match="queries is 1"):
        mean_reciprocal_rank(model, config, space, pictures(1), bank=16, queries=1)
    with pytest.raises(ValueError, match="images is empty"):
        mean_reciprocal_rank(model, config, space, pictures(1)[:0], bank=16)
