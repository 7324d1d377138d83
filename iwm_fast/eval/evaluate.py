"""Evaluate a model on images in one call: MRR of its world model, k-NN and probes of its frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.console import Count
from iwm_fast.eval.feature_cache import FeatureCache
from iwm_fast.eval.features import EncoderName, default_encoder, device_of
from iwm_fast.eval.image_subject import ImageSubject
from iwm_fast.eval.registry import measure, names, usual
from iwm_fast.eval.splits import Split
from iwm_fast.models.iwm import IWM

__all__ = ["evaluate_model", "untrained_model"]


def untrained_model(config: Config, space: ActionSpace, device: torch.device) -> IWM:
    """Return the run's network before its first step. The caller's random state is unchanged."""
    with torch.random.fork_rng(devices=[]):  # parameters are initialised on the CPU
        torch.manual_seed(config.train.seed)
        return IWM(config.model, space.dim).to(device)


def evaluate_model(
    model: IWM,
    config: Config,
    space: ActionSpace,
    *,
    test: Split,
    train: Split | None = None,
    what: Sequence[str] | None = None,
    untrained: bool = True,
    encoder: EncoderName | None = None,
    images: int | None = None,
    queries: int | None = None,
    components: bool = False,
    component_images: int | None = None,
    cache: FeatureCache | None = None,
    progress: Count | None = None,
) -> dict[str, Any]:
    """Run the evaluations ``what``, of `registry.names`; return names, values and protocol, for a table or JSON.

    ``what``: default all that is quick.
    MRR: of ``images`` (default ``eval.mrr_images``) spread evenly over ``test``, on banks of ``eval.bank``; names in
    ``MrrResult.summary``. ``components``: also, under that name, mrr, h1, h5 and controls of each component of the
    action that the run trains with (`component_bank`), and each one's mrr as ``mrr_only_NAME``; of
    ``component_images`` of the images, default all.
    k-NN and probes: fitted on ``train``, measured on ``test``; knn, linear, attentive, linear_top5 and so on, each with
    _interval. ``untrained``: also all of these of the network before training, with _untrained, and the control
    mrr_untrained_target. ``encoder``: default `features.default_encoder`. ``cache``: of features.
    Equivariance: names in ``Equivariance.summary``, of at most ``equivariance.IMAGES`` of ``train`` and ``test``;
    components without R² and why under ``equivariance_left_out``.
    Evaluations that cannot run are under ``not_run`` with the reason; settings that the images cannot satisfy under
    ``reduced``: {name: {asked, used, why}}. Raise ValueError for an unknown ``what``.
    """
    chosen = usual("images") if what is None else what
    unknown = [name for name in chosen if name not in names()]
    if unknown:
        raise ValueError(f"what has {unknown[0]!r}; it may have {', '.join(names())}")
    subject = ImageSubject(
        model,
        config,
        space,
        test,
        train,
        encoder if encoder is not None else default_encoder(config.model),
        untrained_model(config, space, device_of(model)) if untrained else None,
        images=images,
        queries=queries,
        components=components,
        component_images=component_images,
        cache=cache,
        progress=progress,
    )
    return measure(chosen, "images", subject)
