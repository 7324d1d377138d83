"""What each mode trains, what it reads, and how the parts begin.

linear, attentive: a head on the frozen encoder's tokens. predictor: the world model goes on as part of the head: it
acts on the frozen encoder's tokens of the clean image, predicts all patches under the neutral action, and an attentive
head reads them. multitask: the same predictor for several tasks, told which by a learned token. end-to-end: encoder,
predictor and attentive head. Source: arXiv:2403.00504, section 5; a part that begins pretrained has a tenth of the
learning rate of one that begins at random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from iwm_fast.eval.features import EncoderName, Kept, encoder_of
from iwm_fast.models.blocks import limit_workspace
from iwm_fast.models.iwm import IWM
from iwm_fast.models.task_model import HeadShape, Reader, build_head

__all__ = [
    "INITS",
    "MODES",
    "PRETRAINED_FACTOR",
    "Init",
    "Mode",
    "default_rates",
    "has_predictor",
    "kept_for",
    "reader_builder",
]

Mode = Literal["linear", "attentive", "predictor", "end-to-end", "multitask"]
Init = Literal["pretrained", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)
INITS: tuple[Init, ...] = get_args(Init)
PRETRAINED_FACTOR = 0.1
# A head is cheap, so several rates are tried in one pass; with a predictor each of them costs as much as the first.
_HEAD_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_PREDICTOR_RATES = (1e-3,)


def has_predictor(mode: Mode) -> bool:
    """Whether the world model takes part."""
    return mode in ("predictor", "end-to-end", "multitask")


def default_rates(mode: Mode) -> tuple[float, ...]:
    """Learning rates of the head that are tried when none is named."""
    return _PREDICTOR_RATES if has_predictor(mode) else _HEAD_RATES


def kept_for(mode: Mode, *, dense: bool) -> Kept:
    """What of the images the mode reads: a linear head of whole images needs their mean token only."""
    if mode == "end-to-end":
        return "pixels"
    return "pooled" if mode == "linear" and not dense else "tokens"


def reader_builder(
    model: IWM, mode: Mode, init: Init, shapes: Mapping[str, HeadShape], which: EncoderName
) -> Callable[[], Reader]:
    """A function that makes the mode's reader anew: heads, and a predictor of ``init`` random, from torch's seed.

    ``shapes``: of the head of each task. The model's own weights are copied where they are to be trained.
    """
    frozen = encoder_of(model, which)
    shape = model.config.encoder_shape

    def build() -> Reader:
        predictor = None
        if has_predictor(mode):
            source = model if init == "pretrained" else IWM(model.config, model.action_dim)
            predictor = copy.deepcopy(source.predictor).requires_grad_(True)
        reader = Reader(
            copy.deepcopy(frozen).requires_grad_(True) if mode == "end-to-end" else frozen,
            predictor,
            {
                name: build_head("linear" if mode == "linear" else "attentive", head, shape.width, shape.heads)
                for name, head in shapes.items()
            },
            model.action_dim,
            train_encoder=mode == "end-to-end",
            task_tokens=mode == "multitask",
        )
        limit_workspace(reader, model.config.mlp_workspace_mib * 2**20)
        return reader

    return build
