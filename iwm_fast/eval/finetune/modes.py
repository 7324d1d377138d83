"""What each mode trains, what it reads, and how the parts are initialised.

linear, attentive: a head on the frozen encoder's tokens. predictor: the world model is part of the head: from the
frozen encoder's tokens of the clean image it predicts all patches under the neutral action, and an attentive head reads
them.
multitask: the same predictor for several tasks, each with a learned token. end-to-end: encoder, predictor and attentive
head. Source: arXiv:2403.00504, section 5; a pretrained part has a tenth of the learning rate of a randomly initialised
one.
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
# A head is cheap, so several rates are tried in one pass; with a predictor each further rate takes as long as the
# first.
_HEAD_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_PREDICTOR_RATES = (1e-3,)


def has_predictor(mode: Mode) -> bool:
    """Return whether the mode uses the world model's predictor."""
    return mode in ("predictor", "end-to-end", "multitask")


def default_rates(mode: Mode) -> tuple[float, ...]:
    """Return the head's learning rates that are tried by default."""
    return _PREDICTOR_RATES if has_predictor(mode) else _HEAD_RATES


def kept_for(mode: Mode, *, dense: bool) -> Kept:
    """Return the features that the mode reads: a linear head of whole images needs only their mean token."""
    if mode == "end-to-end":
        return "pixels"
    return "pooled" if mode == "linear" and not dense else "tokens"


def reader_builder(
    model: IWM, mode: Mode, init: Init, shapes: Mapping[str, HeadShape], which: EncoderName
) -> Callable[[], Reader]:
    """Return a function that builds the mode's reader: heads, and a predictor if ``init`` is random, from torch's seed.

    ``shapes``: of each task's head. The model's own weights are copied if they are trained.
    """
    frozen = encoder_of(model, which)
    # What the heads read: the predictor's tokens have the target's width.
    architecture = model.config.target_architecture if has_predictor(mode) else model.config.architecture
    shape = architecture.shape

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
