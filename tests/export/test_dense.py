"""The exported networks over whole images compute what the packed ones do."""

from __future__ import annotations

import pytest
import torch

from iwm_fast.config import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.export.dense import WholeEncoder, WholePredictor

ACTIONS = 5
KINDS = [
    *(("vit", name) for name in ("none", "sequence", "feature", "block", "sequence+block", "feature+block")),
    ("mlp", "none"),
    ("mlp", "block"),
]


@pytest.mark.parametrize(("kind", "conditioning"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_encoder_and_predictor_in_float64(plain, kind, conditioning):
    """Every parameter differs from its initial value, so that a missing one shows; float64 rounds at 1e-16."""
    predictor = PredictorConfig(kind=kind, depth=2, width=24, heads=3, conditioning=conditioning)
    shape = EncoderShape(depth=2, width=20, heads=5)
    _compare(plain, ModelConfig(encoder=shape, image=12, patch=4, predictor=predictor))


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_encoders_of_other_architectures(plain, prefix, positions):
    predictor = PredictorConfig(depth=1, width=8, conditioning="block")
    shape = EncoderShape(depth=2, width=24, heads=3)
    told = {"prefix_tokens": prefix, "positions": positions, "norm_eps": 1e-3}
    _compare(plain, ModelConfig(encoder=shape, image=12, patch=4, predictor=predictor, **told))


def _compare(plain, config):
    model = plain.exact_model(config, ACTIONS)
    images = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    action = torch.randn(3, ACTIONS, dtype=torch.float64)
    with torch.no_grad():
        for which, encoder in (("context", model.encoder), ("target", model.target_encoder)):
            torch.testing.assert_close(WholeEncoder(encoder)(images), model.encode(images, which), rtol=0, atol=1e-9)
        z = model.encode(images)
        want = model.predict(z, action)
        torch.testing.assert_close(WholePredictor(model.predictor)(z, action), want, rtol=0, atol=1e-9)
