"""Stand-ins for a model with known mean reciprocal rank, and tiny real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import Jitter
from iwm_fast.config import ActionsConfig, Config, EncoderShape, EvalConfig, MasksConfig, ModelConfig, PredictorConfig
from iwm_fast.eval.world_model.bank import jittered_views
from iwm_fast.models.iwm import IWM

SIDE = 8


def tiny_config(**model) -> Config:
    """Return a configuration of four patches of 4 × 4, two blocks of width 16, banks of 16."""
    shape = {"encoder": EncoderShape(depth=2, width=16, heads=2), "patch": 4, "image": SIDE}
    predictor = PredictorConfig(depth=1, width=16, heads=2)
    return Config(
        model=ModelConfig(**(shape | {"predictor": predictor} | model)),
        masks=MasksConfig(min_context=1),
        eval=EvalConfig(bank=16, mrr_images=3),
    )


def nine_patches(conditioning: str = "feature", *, kind: str = "vit", **options: Any) -> ModelConfig:
    """12 × 12 images of 3 × 3 patches, two encoder and two predictor blocks of different widths."""
    predictor = {
        "kind": kind, "depth": 2, "width": 12, "heads": 3, "mlp_ratio": 1.5, "conditioning": conditioning,
    }  # fmt: skip
    return ModelConfig(
        encoder=EncoderShape(depth=2, width=16, heads=2, mlp_ratio=2.0),
        patch=4,
        image=12,
        predictor=PredictorConfig.model_validate(predictor),
        **options,
    )


def tiny_model(config: Config, seed: int = 0) -> tuple[IWM, ActionSpace]:
    """Return a real model with weights moved off their initial values, zero-initialised ones included."""
    space = ActionSpace(config.actions.groups, config.actions.form)
    torch.manual_seed(seed)
    model = IWM(config.model, space.dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, space


def pictures(count: int, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    """Return clean images of random colours, away from black and white so that few levels are clipped."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(60, 180, (count, side, side, 3), generator=generator, dtype=torch.uint8)


class Pixels(nn.Module):
    """A token is a pixel; subclasses decide the effect of an action."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def encode(self, images, which="context"):  # noqa: ARG002  (the model's signature)
        return images.flatten(1, 2).float()

    def targets(self, images):
        return self.encode(images)


class Oracle(Pixels):
    """Predicts the view that the action leads to, exactly."""

    def __init__(self, space: ActionSpace) -> None:
        super().__init__()
        self.space = space

    def predict(self, z, action):
        decoded = self.space.decode(action.numpy())
        names = ("brightness", "contrast", "saturation")
        jitter = Jitter(*(1 + decoded[name] for name in names), decoded["hue"])
        images = z.to(torch.uint8).unflatten(1, (SIDE, SIDE))
        return torch.cat([self.encode(jittered_views(x, jitter.take([i]))) for i, x in enumerate(images)])


class Deaf(Oracle):
    """Predicts the source, whatever the action."""

    def predict(self, z, action):  # noqa: ARG002  (the model's signature)
        return z


class Collapsed(Oracle):
    """All images have one representation; the prediction depends on the action, and its rounding on the row."""

    def encode(self, images, which="context"):  # noqa: ARG002  (the model's signature)
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(1, SIDE * SIDE, 3, generator=generator).expand(len(images), -1, -1)
        return one * (1 + 3e-7 * torch.randn(len(images), 1, 1, generator=generator))

    def predict(self, z, action):
        return z + action[:, None, :1]


NO_NORM = ModelConfig(patch=4, image=SIDE, normalize_target=False)
RAW = Config(model=NO_NORM, actions=ActionsConfig(strength=0.5), masks=MasksConfig(min_context=1))
