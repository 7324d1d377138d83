"""One call that measures a model: MRR of its world model, k-NN and probes of its frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iwm_fast.actions.transforms import ActionSpace
from iwm_fast.config import Config
from iwm_fast.console import Count
from iwm_fast.errors import UserError
from iwm_fast.eval.reduced import reduced
from iwm_fast.eval.representation.cache import FeatureCache
from iwm_fast.eval.representation.equivariance import measure_equivariance
from iwm_fast.eval.representation.features import EncoderName, default_encoder, device_of
from iwm_fast.eval.representation.probes import POOLING, PROBES, measure_representation
from iwm_fast.eval.splits import Split, cannot_classify
from iwm_fast.eval.world_model.bank import varying
from iwm_fast.eval.world_model.components import GEOMETRIC
from iwm_fast.eval.world_model.components import components as component_names
from iwm_fast.eval.world_model.mrr import mean_reciprocal_rank
from iwm_fast.models.iwm import IWM

__all__ = ["USUAL", "WHAT", "evaluate_model", "untrained_model"]

WHAT = ("mrr", *PROBES, "equivariance", "rollout")
# The attentive probe takes minutes where the others take seconds, so it is measured where it is asked for.
USUAL = ("mrr", "knn", "linear", "equivariance")
# Of a bank of one component, all that is kept beside its mrr.
_PART = ("mrr", "mrr_interval", "h1", "h5", "mrr_chance", "mrr_shuffled", "mrr_neutral", "mrr_bank", "mrr_queries")
# Pairs of views are of at most so many images, spread evenly.
EQUIVARIANCE_IMAGES = (2000, 1000)
_STILL = "the configuration has no colour jitter (actions.strength), so no distinct actions"


def untrained_model(config: Config, space: ActionSpace, device: torch.device) -> IWM:
    """The run's network as it was before its first step. The caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):  # parameters are drawn on the CPU
        torch.manual_seed(config.train.seed)
        return IWM(config.model, space.dim).to(device)


def evaluate_model(
    model: IWM,
    config: Config,
    space: ActionSpace,
    *,
    test: Split,
    train: Split | None = None,
    what: Sequence[str] = USUAL,
    untrained: bool = True,
    encoder: EncoderName | None = None,
    images: int | None = None,
    queries: int | None = None,
    components: bool = False,
    cache: FeatureCache | None = None,
    progress: Count | None = None,
) -> dict[str, Any]:
    """Measure ``what`` and return names and values, with the protocol beside them, ready for a table or JSON.

    MRR: of ``images`` (default ``eval.mrr_images``) spread evenly over ``test``, on banks of ``eval.bank``; names in
    ``MrrResult.summary``. ``components``: also, under that name, mrr, h1, h5 and controls of each component of the
    action that the run trains with (`component_bank`), and each one's mrr as ``mrr_only_NAME``.
    k-NN and probes: fitted on ``train``, measured on ``test``; knn, linear, attentive, linear_top5 and so on, each with
    _interval. ``untrained``: also all of these of the network before training, with _untrained, and the control
    mrr_untrained_target. ``encoder``: default the moving average, where there is one. ``cache``: of features.
    Equivariance: names in ``Equivariance.summary``, of at most ``EQUIVARIANCE_IMAGES`` of ``train`` and ``test``;
    components without R² and why under ``equivariance_left_out``.
    What cannot be measured stands under ``not_run`` with its reason, a setting that the images cannot satisfy under
    ``reduced``: {name: {asked, used, why}}. Raises ValueError for an unknown ``what``.
    """
    unknown = [name for name in what if name not in WHAT]
    if unknown:
        raise ValueError(f"what has {unknown[0]!r}; it may have {', '.join(WHAT)}")
    which = encoder if encoder is not None else default_encoder(config.model)
    models = [model] + ([untrained_model(config, space, device_of(model))] if untrained else [])
    found: list[dict[str, Any]] = []
    # Probes read all images, so what is wrong with these is found before anything else is measured.
    probes = [name for name in PROBES if name in what]
    missing = cannot_classify(train, test)
    if probes and train is not None and missing is None:
        found.append(measure_representation(models, which, train, test, probes, cache=cache, progress=progress))
    elif probes:
        found.append({"not_run": dict.fromkeys(probes, missing)})
    if "mrr" in what and not varying(config.actions):
        found.append({"not_run": {"mrr": _STILL}})
    elif "mrr" in what:
        wanted = images if images is not None else config.eval.mrr_images
        if wanted > len(test):
            why = f"there are {len(test)} test images"
            found.append({"reduced": {"mrr_images": reduced(wanted, len(test), why)}})
        strange = models[1] if untrained else None
        found.append(
            _world_model(model, config, space, test.numbered_spread(wanted), queries, components, strange, progress)
        )
    if "equivariance" in what:
        found.append(_equivariance(models, config, which, train, test, progress))
    if "rollout" in what:
        found.append({"not_run": {"rollout": "a roll-out needs triplets, and these are images"}})
    return _together(found)


def _together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All names and values; those under ``not_run`` and ``reduced`` joined."""
    results: dict[str, Any] = {}
    for part in found:
        nested = {key: results.get(key, {}) | part[key] for key in ("not_run", "reduced") if key in part}
        results |= part | nested
    return results


def _world_model(
    model: IWM,
    config: Config,
    space: ActionSpace,
    banked: tuple[Tensor, list[int]],
    queries: int | None,
    components: bool,
    strange: IWM | None,
    progress: Count | None,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for vary in (None, *component_names(config.actions)) if components else (None,):
        found = mean_reciprocal_rank(
            model,
            config,
            space,
            banked[0],
            numbers=banked[1],
            bank=config.eval.bank,
            queries=queries if vary not in GEOMETRIC else None,
            vary=vary,
            untrained=strange if vary is None else None,
            progress=None if progress is None else partial(progress, "mrr" if vary is None else f"mrr, {vary} only"),
        )
        if vary is None:
            results |= found.summary()
        else:
            summary = found.summary()
            parts[vary] = {key: summary[key] for key in _PART}
    flat = {f"mrr_only_{name}": part["mrr"] for name, part in parts.items()}
    return results | flat | ({"components": parts} if parts else {})


def _equivariance(
    models: Sequence[IWM],
    config: Config,
    which: EncoderName,
    train: Split | None,
    test: Split,
    progress: Count | None,
) -> dict[str, Any]:
    """Names and values of the model and of the untrained one, or ``not_run`` with the reason."""
    wanted = EQUIVARIANCE_IMAGES
    if train is None:
        return {"not_run": {"equivariance": "no training images were given"}}
    fitted, measured = train.spread(wanted[0]), test.spread(wanted[1])
    if len(fitted) < 5 or len(measured) < 2:
        return {"not_run": {"equivariance": f"{len(fitted)} training and {len(measured)} test images are too few"}}
    tell = None if progress is None else partial(progress, "pairs of views")
    try:
        found = measure_equivariance(models, config.actions, fitted, measured, which=which, progress=tell)
    except UserError as error:  # nothing varies: what else was measured is not lost for that
        return {"not_run": {"equivariance": str(error)}}
    results: dict[str, Any] = {
        "equivariance_chance": 0.0,
        "equivariance_encoder": which,
        "equivariance_pooling": POOLING,
        "equivariance_pairs": [len(fitted), len(measured)],
        "equivariance_left_out": found[0].left_out,
    }
    for end, one in zip(("", "_untrained"), found, strict=False):
        results |= one.summary(end)
    return results
