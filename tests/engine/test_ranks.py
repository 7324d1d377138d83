"""Two CPU ranks: the trajectory of one at every stage, and resume across world sizes."""

import pytest
import torch
from launched import on_ranks
from made_triplets import write_game
from second_term import WITH_VARIANCE
from small_run import losses, metrics, small_config, state

from iwm_fast.engine import pretrain
from iwm_fast.eval.online import OnlineEvaluator
from iwm_fast.models import objective

pytestmark = pytest.mark.slow  # two ranks, a dozen trainings

REGULARIZED = {
    "model__target": "shared",
    "model__regularizer__center": "position",
    "model__regularizer__mean_weight": 0.5,
}
ARCHITECTURES = {
    "rope": {"model__prefix_tokens": 5, "model__positions": "rope"},
    "learned": {"model__prefix_tokens": 1, "model__positions": "learned", "train__activation_checkpointing": True},
}
# More than half of the weights: the second rank's slice has nothing of the encoder.
WIDE_PREDICTOR = {"model__predictor__width": 64, "train__steps": 5}


@pytest.fixture(scope="module")
def runs(tiny_images, tmp_path_factory):
    """One rank, and on two ranks: each stage, accumulation, and halves resumed in both directions."""
    out = tmp_path_factory.mktemp("ranks")
    pretrain(small_config(tiny_images), out / "one")
    for stage in (0, 2):
        pretrain(small_config(tiny_images, train__steps=10, zero__stage=stage), out / f"one_then_two_{stage}")
    jobs = [{"name": f"two_{s}", "zero__stage": s} for s in range(4)]
    jobs += [
        {"name": f"two_accumulated_{s}", "zero__stage": s, "train__micro_batch": 2, "train__steps": 6} for s in range(4)
    ]
    jobs += [{"name": f"one_then_two_{s}", "zero__stage": then, "resume": "auto"} for s, then in ((0, 3), (2, 1))]
    jobs += [{"name": f"two_then_one_{s}", "zero__stage": s, "train__steps": 10} for s in (0, 1, 3)]
    jobs += [{"name": f"two_halves_{s}", "zero__stage": s, "train__steps": 10} for s in (1, 3)]
    jobs += [{"name": f"two_halves_{s}", "zero__stage": s, "resume": "auto"} for s in (1, 3)]
    pretrain(small_config(tiny_images, **WIDE_PREDICTOR), out / "one_wide")
    jobs += [{"name": f"two_wide_{s}", "zero__stage": s, **WIDE_PREDICTOR} for s in (1, 3)]
    measured = {"train__steps": 1, "eval__every_steps": 1, "eval__root": str(tiny_images), "eval__mrr_images": 3}
    measured |= {"eval__bank": 16}
    pretrain(small_config(tiny_images, **measured), out / "one_measured", evaluator=OnlineEvaluator())
    jobs += [{"name": f"two_measured_{s}", "zero__stage": s, **measured} for s in (0, 2)]
    short = {"train__steps": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "TERMS", WITH_VARIANCE)
        pretrain(small_config(tiny_images, **short), out / "one_variance")
    jobs += [{"name": f"two_variance_{s}", "variance": True, "zero__stage": s, **short} for s in (0, 1, 2, 3)]
    for kind in ("sigreg", "vicreg"):
        regularized = REGULARIZED | {"model__regularizer__kind": kind} | short
        pretrain(small_config(tiny_images, **regularized), out / f"one_{kind}")
        jobs += [{"name": f"two_{kind}_{s}", "zero__stage": s, **regularized} for s in range(4)]
    for name, changes in ARCHITECTURES.items():
        pretrain(small_config(tiny_images, **changes, **short), out / f"one_{name}")
        jobs += [{"name": f"two_{name}_{s}", "zero__stage": s, **changes, **short} for s in range(4)]
    game = str(write_game(out / "game", steps=4))
    ahead = {"actions__groups": ["external"], "model__history": 2, "train__horizon": 3, "data__root": game} | short
    pretrain(small_config(tiny_images, **ahead), out / "one_ahead")
    jobs += [{"name": f"two_ahead_{s}", "zero__stage": s, "train__micro_batch": 2, **ahead} for s in range(4)]
    on_ranks(2, tiny_images, out, jobs)
    for stage in (0, 1, 3):
        pretrain(small_config(tiny_images, zero__stage=0), out / f"two_then_one_{stage}", resume="auto")
    return out


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_follow_one(runs, stage):
    assert losses(runs / f"two_{stage}") == pytest.approx(losses(runs / "one"), rel=1e-4)
    norms = [[r["grad_norm"] for r in metrics(runs / name)] for name in (f"two_{stage}", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_several_steps_ahead_follow_one_rank(runs, stage):
    """Episodes end at other steps on each rank, so that a step may be empty on one of them."""
    one, two = (metrics(runs / name) for name in ("one_ahead", f"two_ahead_{stage}"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_term_that_is_a_statistic_of_the_global_batch_is_the_same_on_two_ranks(runs, stage):
    one, two = (metrics(runs / name) for name in ("one_variance", f"two_variance_{stage}"))
    for key in ("loss", "loss_prediction", "loss_variance"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-4)
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["sigreg", "vicreg"])
def test_a_regulariser_is_the_same_on_two_ranks(runs, kind, stage):
    one, two = (metrics(runs / name) for name in (f"one_{kind}", f"two_{kind}_{stage}"))
    for key in ("loss", "loss_prediction", f"loss_{kind}"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-4)
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefix_tokens_and_positions_train_alike_on_two_ranks(runs, name, stage):
    one, two = (metrics(runs / run) for run in (f"one_{name}", f"two_{name}_{stage}"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_without_a_part_of_the_encoder_follows_too(runs, stage):
    assert losses(runs / f"two_wide_{stage}") == pytest.approx(losses(runs / "one_wide"), rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_on_two_ranks_follows_one(runs, stage):
    assert losses(runs / f"two_accumulated_{stage}") == pytest.approx(losses(runs / "one")[:6], rel=1e-4)


@pytest.mark.parametrize(
    "name", ["one_then_two_0", "one_then_two_2", "two_then_one_0", "two_then_one_1", "two_then_one_3"]
)
def test_a_run_resumes_with_another_number_of_ranks(runs, name):
    assert [r["step"] for r in metrics(runs / name)] == list(range(1, 21))
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_halves_on_two_ranks_equal_the_whole_bit_for_bit(runs, stage):
    assert losses(runs / f"two_halves_{stage}") == losses(runs / f"two_{stage}")
    whole, halves = state(runs / f"two_{stage}", 20), state(runs / f"two_halves_{stage}", 20)
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_share_the_evaluation_and_find_what_one_finds(runs, stage):
    """After one step the weights agree up to rounding; of three images one rank evaluates two, the other one."""
    one, two = (metrics(runs / name)[-1] for name in ("one_measured", f"two_measured_{stage}"))
    for key in ("mrr", "mrr_shuffled", "mrr_chance", "knn", "knn_chance"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key
