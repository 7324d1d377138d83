"""The keys that an evaluation may override; a key without effect is refused with the reason."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from iwm_fast.actions.transforms import JITTER
from iwm_fast.config import Config
from iwm_fast.config.schema_table import rows
from iwm_fast.errors import UserError
from iwm_fast.eval.registry import Kind, evaluations

__all__ = ["check_overrides", "for_evaluation", "overridden"]

_JITTER = tuple(f"actions.{name}" for name in ("strength", *JITTER))
_DECODING = ("device", "threads", "readers", "max_pixels", "max_bad_fraction", "wait_s", "hw_decoder_load")
_DATA = tuple(f"data.{name}" for name in _DECODING)
_STORES = ("data.store_timeout", "data.store_attempts")
_IMAGES = ("data.source", *_DATA, *_STORES)
# Why a key of the sections that may be overridden has no effect here.
_WHY = {
    "data.root": "it is the run's training data; --data names the data of this evaluation",
    "data.prefetch": "it is for training only",
    "eval.every_steps": "it is for evaluation while training",
    "eval.every_epochs": "it is for evaluation while training",
    "eval.root": "it is for evaluation while training; --data names the data of this evaluation",
    "eval.images": "it is for evaluation while training; here all images are read, and --images sets those of MRR",
}


def overridden(words: Sequence[str]) -> set[str]:
    """Return the keys of ``key.path=value`` words."""
    return {word.partition("=")[0].strip() for word in words}


def check_overrides(words: Sequence[str], *, command: str, external: bool = False, what: Collection[str] = ()) -> None:
    """Raise UserError for the first override without effect.

    ``command``: evaluate, finetune or embed; ``external``: for a run on triplets; ``what``: the evaluations. An unknown
    key is left to the configuration, which names the nearest key.
    """
    allowed, why = _allowed(command, external, what)
    allowed = (*allowed, "plugins")
    for word in words:
        key = word.partition("=")[0].strip()
        if key in allowed:
            continue
        reason = {**_WHY, **why}.get(key)
        if reason is not None:
            raise UserError(f"command line: {key}: {reason}; leave it out")
        known = key.startswith(("data.", "eval.")) if command == "evaluate" else key.startswith("data.")
        if not known or key in {row.key for row in rows()}:
            raise UserError(
                f"command line: {word}: {command} can override {', '.join(allowed)} only; the rest is the run's"
            )


def for_evaluation(config: Config, words: Sequence[str]) -> Config:
    """Return the run's configuration for other data: their kind is detected, and missing data are not waited for,
    unless an override says otherwise.
    """
    keys = overridden(words)
    usual = {"source": "auto", "wait_s": 0.0}
    changed = {name: value for name, value in usual.items() if f"data.{name}" not in keys}
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def _allowed(command: str, external: bool, what: Collection[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the keys with an effect, and the reasons for others."""
    if command in ("finetune", "embed"):
        return _IMAGES, {}
    if external:
        why = {
            "data.source": "it is for images; this run's data are triplets",
            "eval.mrr_images": "it is for images; for triplets, eval.bank or --images sets the number of next frames",
            **dict.fromkeys(_STORES, "it is for object stores, and triplets are local files"),
            **dict.fromkeys(_JITTER, "it is for images; a run on triplets has no jitter"),
        }
        allowed = _DATA
    else:
        why = {"eval.horizon": "it is for roll-outs, which need triplets"}
        allowed = (*_IMAGES, *_JITTER, "eval.bank")  # the report always ranks a few banks
    here, elsewhere = (_readers(kind) for kind in (("triplets", "images") if external else ("images", "triplets")))
    for key, names in elsewhere.items():
        why.setdefault(key, f"it is for {' and '.join(names)}, which needs {'images' if external else 'triplets'}")
    why |= {key: f"it is for {' and '.join(names)}, which --what leaves out" for key, names in here.items()}
    return (*allowed, *(key for key, names in here.items() if set(names) & set(what))), why


def _readers(kind: Kind) -> dict[str, list[str]]:
    """Return, by key of the configuration, the evaluations that read it on this kind of data."""
    found: dict[str, list[str]] = {}
    for one in evaluations(kind):
        how = one.on(kind)
        for key in how.settings if how is not None else ():
            found.setdefault(key, []).append(one.name)
    return found
