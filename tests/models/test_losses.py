"""The loss: its factors, what is logged, and that a second term needs only an entry."""

from __future__ import annotations

import copy

import pytest
import torch
from second_term import WITH_VARIANCE, Variance
from small_run import small_config

from iwm_fast.actions.external import space_of
from iwm_fast.config import ModelConfig
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.engine.step import Trainer
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.models import objective
from iwm_fast.models.losses import GlobalBatch, LatentDistance
from iwm_fast.models.objective import Objective, objective_of

BATCH = GlobalBatch(ranks=3, micro_batches=6, images=30, context=700, predicted=110, width=7)


def trainer_of(**changes: object) -> Trainer:
    config = small_config("unread", **changes)  # type: ignore[arg-type]
    space, ranks = space_of(config.actions), start(alone=True)
    return prepare_trainer(config, space, synthetic_stream(config, space, ranks.device), ranks)


def test_a_sum_over_tokens_is_divided_by_those_of_the_global_batch_and_a_statistic_by_the_micro_batches() -> None:
    assert Objective([LatentDistance(normalize=True)]).factors(BATCH) == (3 / (110 * 7),)
    assert Objective([LatentDistance(normalize=True), Variance(weight=0.25)]).factors(BATCH) == (3 / (110 * 7), 0.125)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_configuration_minimises_the_distance_of_predictions_to_targets(normalize: bool) -> None:
    assert objective_of(ModelConfig(normalize_target=normalize)).terms == (LatentDistance(normalize),)


def test_terms_are_logged_by_name_where_there_are_several() -> None:
    one = Objective([LatentDistance(normalize=True)])
    assert one.logged([2.5]) == {"loss": 2.5}
    two = Objective([*one.terms, Variance()])
    assert two.logged([2.5, 0.25]) == {"loss": 2.75, "loss_prediction": 2.5, "loss_variance": 0.25}


@pytest.mark.parametrize("changes", [{"train__micro_batch": 2, "zero__stage": 1}, {"train__static_shapes": True}])
def test_an_entry_in_the_table_is_trained_with_and_logged(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the term written out, with the weights before the step; the gradient is that of the sum."""
    alone = trainer_of(**changes).train_step()
    monkeypatch.setattr(objective, "TERMS", WITH_VARIANCE)
    trainer = trainer_of(**changes)
    model, batches = copy.deepcopy(trainer.zero.module), iter(trainer.stream)
    micro_batches = trainer.stream.accumulation
    variance = torch.zeros(())
    for _ in range(micro_batches):
        *given, factors = trainer.packer(next(batches), 0).arguments
        source, context, seen = given[0], given[3], given[4]
        std = (model.encoder(source, context, seen)[: seen.real].var(dim=0, correction=0) + 1e-4).sqrt()
        share = 8.0 * (2 - std).clamp_min(0).mean() / micro_batches
        (model(*given, (factors[0], 0.0)).loss + share).backward()
        variance += share.detach()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    record = trainer.train_step()
    assert alone is not None
    assert record is not None
    assert not any(key.startswith("loss_") for key in alone)
    assert record["loss_prediction"] == pytest.approx(alone["loss"], rel=1e-6)
    assert record["loss_variance"] == pytest.approx(float(variance), rel=1e-5)
    assert record["loss"] == pytest.approx(alone["loss"] + float(variance), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert record["grad_norm"] != pytest.approx(alone["grad_norm"], rel=1e-2)
