from __future__ import annotations

import pytest
import torch
from worlds import pictures, tiny_config, tiny_model

from iwm_fast.eval.features import default_encoder, evaluating, pooled_features


@pytest.mark.parametrize("which", ["target", "context"])
def test_features_are_the_mean_token_whatever_the_batches(which):
    model, _ = tiny_model(tiny_config())
    images = pictures(7)
    with torch.no_grad():
        want = model.encode(images, which).mean(dim=1)
    for batches, chunk in ((images, 3), (images, 128), (images.split(2), 128), (iter(images.split(5)), 2)):
        (found,) = pooled_features([model], batches, which=which, chunk=chunk)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        assert found.dtype == torch.float32


def test_several_models_share_one_pass():
    config = tiny_config()
    models = [tiny_model(config, seed)[0] for seed in (0, 1)]
    reads = []

    def batches():
        for batch in pictures(5).split(2):
            reads.append(len(batch))
            yield batch

    both = pooled_features(models, batches(), which="target")
    assert reads == [2, 2, 1]
    for model, found in zip(models, both, strict=True):
        torch.testing.assert_close(found, pooled_features([model], pictures(5), which="target")[0])


def test_a_bf16_model_gives_float32_features():
    model, _ = tiny_model(tiny_config())
    (want,) = pooled_features([model], pictures(3), which="target")
    (found,) = pooled_features([model.bfloat16()], pictures(3), which="target")
    assert found.dtype == torch.float32
    assert (found - want).abs().mean() < 0.05 * want.abs().mean()  # 2^-8 a rounding, two blocks of a dozen


def test_modes_are_put_back_even_after_an_error():
    model, _ = tiny_model(tiny_config())
    model.train()
    seen = []

    def fails():
        with evaluating(model):
            seen.append(model.training)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == [False]
    assert model.training


def test_default_encoder_is_the_ema_if_there_is_one():
    assert default_encoder(tiny_config(target="ema").model) == "target"
    assert default_encoder(tiny_config(target="shared").model) == "context"


def test_no_image_is_refused():
    model, _ = tiny_model(tiny_config())
    with pytest.raises(ValueError, match="no image"):
        pooled_features([model], [], which="target")
