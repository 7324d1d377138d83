"""Training with static shapes: the losses of training without, few sizes, and the padding in the metrics."""

from __future__ import annotations

import pytest
from made_triplets import write_game
from small_run import losses, metrics, small_config

from iwm_fast.engine import pretrain, step

VARIANTS = {
    "sources and micro-batches at stage 1": {
        "views__sources_per_target": 2,
        "train__micro_batch": 4,
        "zero__stage": 1,
        "model__predictor__conditioning": "sequence+block",
    },
    "prefix tokens and rope": {"model__prefix_tokens": 3, "model__positions": "rope", "train__micro_batch": 4},
    "triplets": {"actions__groups": ["external"], "model__history": 2, "train__micro_batch": 4},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_losses_are_those_of_the_training_without(tiny_images, tmp_path, changes, monkeypatch):
    """fp32, up to rounding over three steps; every batch has one of the planned sizes, none is cut."""
    root = write_game(tmp_path / "game") if "actions__groups" in changes else tiny_images
    met = []
    forward = step.Trainer._forward

    def noting(trainer, batch):
        output = forward(trainer, batch)
        met.append((trainer.packer.sizes.copy(), output.tokens))
        return output

    pretrain(small_config(root, train__steps=3, **changes), tmp_path / "as it is")
    monkeypatch.setattr(step.Trainer, "_forward", noting)
    pretrain(small_config(root, train__steps=3, train__static_shapes=True, **changes), tmp_path / "static")
    assert losses(tmp_path / "static") == pytest.approx(losses(tmp_path / "as it is"), rel=2e-6)
    without, records = metrics(tmp_path / "as it is"), metrics(tmp_path / "static")
    for key in ("rank_me", "target_spread", "grad_norm"):
        assert [r[key] for r in records] == pytest.approx([r[key] for r in without], rel=1e-4)
    assert all("padded" not in record and "token_sizes" not in record for record in without)
    assert all(0 < record["padded"] < 0.5 for record in records)
    sizes = met[-1][0]
    assert records[-1]["token_sizes"] == len(sizes) <= 4
    assert all(size % 8 == 0 for pair in sizes for size in pair)
    assert all(tokens <= max(asked for _, asked in sizes) for _, tokens in met)
