"""The operators inside DeepSpeed: at ZeRO stage 3 weights exist only while their module runs."""

import pytest
from small_run import losses, small_config

from iwm_fast.engine import pretrain
from iwm_fast.kernels import use_backend


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_pretraining_follows_the_reference(stage, tiny_images, tmp_path):
    """Losses in fp32 to 1e-4, as between stages: encoder, predictor with block conditioning, and the loss."""
    found = {}
    for backend in ("triton", "reference"):
        config = small_config(
            tiny_images, train__steps=2, train__global_batch=4, zero__stage=stage, model__encoder__depth=1,
            model__predictor__depth=1, model__predictor__conditioning="feature+block",
        )  # fmt: skip
        with use_backend(backend):
            pretrain(config, tmp_path / backend)
        found[backend] = losses(tmp_path / backend)
    assert found["triton"] == pytest.approx(found["reference"], rel=1e-4)
