"""What fits a configuration, and the keys that are named where it does not."""

import math
from dataclasses import replace

import pytest
import torch
from made_weights import OWN, SHAPE, hub_folder, timm_state
from safetensors.torch import save_file

from iwm_fast.config import EncoderShape
from iwm_fast.errors import UserError
from iwm_fast.families import fit_encoder, read_weights, recognise
from iwm_fast.families.resize import resample_patches, resize_positions
from iwm_fast.models.positions import sincos_positions


def saved(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    return recognise(read_weights(tmp_path / "w.safetensors"))


MISFITS = {
    "width": (
        {"shape": EncoderShape(depth=2, width=64, heads=2, mlp_ratio=2.0)},
        r"w: norm\.weight is 32 there and 64 in the configuration: set 'model\.encoder=\{depth: 2, width: 32, heads",
    ),
    "depth": (
        {"shape": SHAPE.model_copy(update={"depth": 3})},
        r"w: it has 2 blocks, and the configuration 3: set 'model\.encoder=",
    ),
    "hidden width": (
        {"shape": SHAPE.model_copy(update={"mlp_ratio": 4.0})},
        r"blocks\.0\.mlp\.fc1\.weight is 64×32 there and 128×32 in .*: set 'model\.encoder=\{.*, mlp_ratio: 2\}'$",
    ),
    "prefix tokens": (
        {"prefix_tokens": 0},
        r"w: cls_token: 1 prefix tokens there and 0 in the configuration: set model\.prefix_tokens=1$",
    ),
    "positions": (
        {"positions": "sincos", "prefix_tokens": 0},
        r"set model\.prefix_tokens=1 model\.positions=learned$",
    ),
    "rotations": ({"positions": "rope"}, r"its positions are learned, and model\.positions is rope: set"),
    "eps": (
        {"norm_eps": 1e-5},
        r"w: its normalisations have an eps of 1e-06, and model\.norm_eps is 1e-05: set model\.norm_eps=1e-06$",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_misfit_names_the_tensor_and_all_keys(tmp_path, what):
    change, line = MISFITS[what]
    with pytest.raises(UserError, match=line) as caught:
        fit_encoder("w", saved(tmp_path, timm_state()), replace(OWN, **change))
    assert "\n" not in str(caught.value)


def test_a_usual_size_is_named_and_the_patch_with_it(tmp_path):
    wanted = replace(OWN, shape=EncoderShape(depth=12, width=768, heads=12), image=48, patch=16, prefix_tokens=0)
    state = timm_state(patch=14, width=192, depth=12, tokens=5)
    for block in range(12):  # of vit_tiny
        state[f"blocks.{block}.mlp.fc1.weight"] = torch.ones(768, 192)
        state[f"blocks.{block}.mlp.fc2.weight"] = torch.ones(192, 768)
    found = saved(tmp_path, state)
    with pytest.raises(UserError) as caught:
        fit_encoder("w", found, replace(wanted, positions="sincos"))
    assert str(caught.value) == (
        "w: norm.weight is 192 there and 768 in the configuration: set model.encoder=vit_tiny model.prefix_tokens=5 "
        "model.positions=learned model.patch=14 model.image=56"
    )


def test_heads_are_compared_where_config_json_says_them(tmp_path):
    found = recognise(read_weights(hub_folder(tmp_path / "w")))
    wanted = replace(OWN, norm_eps=1e-12, shape=SHAPE.model_copy(update={"heads": 4}))
    with pytest.raises(UserError, match=r"its attention has 2 heads, and the configuration's 4: set 'model\.encoder="):
        fit_encoder("w", found, wanted)


def test_a_frozen_target_s_keys_are_those_of_target_encoder(tmp_path):
    found = recognise(read_weights(hub_folder(tmp_path / "w")))
    with pytest.raises(UserError) as caught:
        fit_encoder("w", found, replace(OWN, prefix_tokens=0, positions="sincos"), frozen=True)
    assert str(caught.value).endswith(
        "set 'model.target_encoder={encoder: {depth: 2, width: 32, heads: 2, mlp_ratio: 2}, prefix_tokens: 1, "
        "positions: learned, norm_eps: 1e-12}'"
    )


def test_a_family_without_a_rule_for_patches_says_so(tmp_path):
    found = recognise(read_weights(hub_folder(tmp_path / "w")))
    with pytest.raises(UserError) as caught:
        fit_encoder("w", found, replace(OWN, norm_eps=1e-12, patch=16))
    assert str(caught.value) == (
        "w: embeddings.patch_embeddings.projection.weight is for patches of 8 pixels, and model.patch is 16; "
        "transformers' ViTModel has no rule that resamples them: set model.patch=8"
    )


def ijepa_state():
    state = timm_state(tokens=0)
    return state | {"pos_embed": sincos_positions(32, 4)[None]}


def test_i_jepa_s_fixed_positions_are_those_of_any_grid(tmp_path):
    found = saved(tmp_path, ijepa_state())
    assert found.family == "I-JEPA"
    fixed = replace(OWN, prefix_tokens=0, positions="sincos", image=48)
    assert "pos_embed" not in fit_encoder("w", found, fixed).encoder
    learned = fit_encoder("w", found, replace(fixed, positions="learned")).encoder
    assert torch.equal(learned["pos_embed"], sincos_positions(32, 6))


def test_fixed_positions_that_a_family_interpolates_are_learned_at_another_grid(tmp_path):
    state = timm_state()
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), sincos_positions(32, 4)[None]], dim=1)
    found = saved(tmp_path, state)
    assert found.family == "MAE"
    assert "pos_embed" not in fit_encoder("w", found, replace(OWN, positions="sincos")).encoder
    with pytest.raises(
        UserError, match=r"MAE interpolates for 6×6, and model\.positions is sincos: set model\.positions=lea"
    ):
        fit_encoder("w", found, replace(OWN, positions="sincos", image=48))
    assert fit_encoder("w", found, replace(OWN, image=48)).encoder["pos_embed"].shape == (36, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_type_become_fp32(tmp_path, dtype):
    found = saved(tmp_path, {name: value.to(dtype) for name, value in timm_state(scaled=True).items()})
    assert {tensor.dtype for tensor in fit_encoder("w", found, OWN).encoder.values()} == {torch.float32}


def cubic(row, size, scale, a=-0.75):
    """Interpolate a row by cubic convolution, sample by sample: places are (i + 1/2) / scale − 1/2."""

    def weight(x):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    found = []
    for i in range(size):
        place = (i + 0.5) / scale - 0.5
        near = math.floor(place)
        found.append(sum(weight(place - k) * row[min(max(k, 0), len(row) - 1)] for k in range(near - 1, near + 3)))
    return found


@pytest.mark.parametrize(("rule", "scale"), [("bicubic", 7 / 4), ("bicubic with an offset of 0.1", 7.1 / 4)])
def test_positions_are_interpolated_by_cubic_convolution(rule, scale):
    """The offset of DINOv2's own code moves every place by a little."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([cubic(row.tolist(), 7, scale) for row in table])
    want = torch.tensor([cubic(column.tolist(), 7, scale) for column in columns.T]).T
    torch.testing.assert_close(resize_positions(table.reshape(16, 1), 7, rule).view(7, 7), want, rtol=0, atol=1e-5)


def test_a_rule_that_is_none_is_refused():
    with pytest.raises(ValueError, match="rule is 'none'"):
        resize_positions(torch.zeros(4, 1), 3, "none")


def test_resampled_patches_answer_an_enlarged_patch_as_the_old_ones_the_patch():
    weight, pixels = torch.randn(5, 3, 8, 8), torch.randn(1, 3, 8, 8)
    larger = torch.nn.functional.interpolate(pixels, size=(12, 12), mode="bicubic", antialias=True, align_corners=False)
    want = torch.einsum("dcyx,bcyx->d", weight, pixels)
    torch.testing.assert_close(
        torch.einsum("dcyx,bcyx->d", resample_patches(weight, 12), larger), want, rtol=0, atol=1e-3
    )
