"""The keys of an encoder's architecture and of the weights that it starts from."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from iwm_fast.config import EncoderArchitecture, EncoderShape, ModelConfig
from iwm_fast.config.sections.model import TargetEncoderConfig

CONTRADICTIONS = {
    "a frozen target without weights": (
        {"target": "frozen"},
        "target is frozen and target_init is null; set target_init to the target's weights",
    ),
    "weights of another target": (
        {"target_init": "w"},
        "target_init is of a frozen target, and target is ema; set target to frozen",
    ),
    "the architecture of another target": (
        {"target": "shared", "target_encoder": TargetEncoderConfig(encoder="vit_tiny")},
        "target_encoder is of a frozen target, and target is shared; set target to frozen",
    ),
    "the average of a constant": (
        {"freeze_encoder": True, "init": "w"},
        (
            "freeze_encoder is true and target is ema, whose average of a constant is the encoder itself; "
            "set target to shared, or to frozen with target_init"
        ),
    ),
    "a frozen encoder without weights": (
        {"freeze_encoder": True, "target": "shared"},
        "freeze_encoder is true and init is null; set init to the encoder's weights",
    ),
    "pixels of no weights": (
        {"init_pixels": "half"},
        "init_pixels is half and there are no weights; set init or target_init",
    ),
    "heads that rope cannot rotate": (
        {"positions": "rope", "encoder": EncoderShape(depth=1, width=12, heads=2)},
        "positions is rope, so width / heads must be a multiple of 4; it is 6",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_keys_that_contradict_each_other(name):
    given, line = CONTRADICTIONS[name]
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**given)
    assert str(caught.value.errors()[0]["ctx"]["error"]) == line


def test_rope_of_a_target_is_checked_too():
    with pytest.raises(ValidationError, match="multiple of 4; it is 6"):
        TargetEncoderConfig(encoder=EncoderShape(depth=1, width=12, heads=2), positions="rope")


def test_the_architecture_holds_what_weights_depend_on():
    model = ModelConfig(encoder="vit_tiny", image=32, patch=4, norm_eps=1e-5)
    shape = EncoderShape(depth=12, width=192, heads=3)
    assert model.architecture == EncoderArchitecture(shape, 32, 4, 0, "sincos", 1e-5, 100.0)
    assert model.target_architecture == model.architecture
    assert model.architecture.grid == 8
