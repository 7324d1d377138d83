"""An encoder, optionally with the world model, and one head per task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from iwm_fast.models.heads import AttentiveHead, DenseHead, LinearHead
from iwm_fast.models.predictors import MlpPredictor, VitPredictor, predict_all
from iwm_fast.models.vit import VisionTransformer

__all__ = ["HeadKind", "HeadShape", "Reader", "build_head"]

HeadKind = Literal["linear", "attentive"]


@dataclass(frozen=True)
class HeadShape:
    """The output of a head: ``classes`` of an image, or of each patch (``dense``)."""

    classes: int
    dense: bool


def build_head(kind: HeadKind, shape: HeadShape, width: int, heads: int) -> nn.Module:
    """Return a new head for tokens of ``width``; ``heads``: of its attention, where it has one."""
    if shape.dense:
        return DenseHead(width, heads if kind == "attentive" else 0, shape.classes)
    return AttentiveHead(width, heads, shape.classes) if kind == "attentive" else LinearHead(width, shape.classes)


class Reader(nn.Module):
    """The encoder, then the world model under the neutral action (where there is one), then the task's head.

    A frozen encoder is not registered: several readers share it, and it is not among ``parameters`` or in
    ``state_dict``.

    ``task_tokens``: one learned token per task, of the predictor's width, that the predictor sees beside the image
    (multitask; arXiv:2403.00504, section 5.3).
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: VitPredictor | MlpPredictor | None,
        heads: Mapping[str, nn.Module],
        action_dim: int,
        *,
        train_encoder: bool = False,
        task_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.trained_encoder = encoder if train_encoder else None
        # In a tuple, so that it is no sub-module.
        self._frozen: tuple[VisionTransformer, ...] = () if train_encoder else (encoder,)
        self.predictor = predictor
        # By index: a task may have any name, and torch's dictionaries reject some.
        self.places = {name: str(place) for place, name in enumerate(heads)}
        self.heads = nn.ModuleDict({self.places[name]: head for name, head in heads.items()})
        self.action_dim = action_dim
        self.task_tokens: nn.ParameterDict | None = None
        if task_tokens:
            if not isinstance(predictor, VitPredictor):
                raise ValueError("task_tokens needs a vit predictor: the tokens of mlp do not see each other")
            tokens = {place: torch.empty(predictor.mask_token.shape) for place in self.heads}
            self.task_tokens = nn.ParameterDict({k: nn.init.trunc_normal_(v, std=0.02) for k, v in tokens.items()})

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder, trained or frozen."""
        return self._frozen[0] if self.trained_encoder is None else self.trained_encoder

    def forward(self, inputs: Tensor, task: str) -> Tensor:
        """Return the logits of ``task``, (B, C), or (B, C, G, G) where it is dense.

        ``inputs``: uint8 images (B, S, S, 3), or their tokens (B, L, D) from the encoder.
        """
        if inputs.dtype == torch.uint8:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained_encoder is not None):
                inputs = self.encoder(inputs).unflatten(0, (-1, self.encoder.patches))
        if self.predictor is not None:
            extra = None if self.task_tokens is None else self.task_tokens[self.places[task]]
            neutral = inputs.new_zeros(len(inputs), self.action_dim)
            inputs = predict_all(self.predictor, inputs, neutral, extra)
        return self.heads[self.places[task]](inputs)
