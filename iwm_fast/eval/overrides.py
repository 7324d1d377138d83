"""Which keys of a configuration an evaluation may replace, and what each of them is for: none is taken and not used."""

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
# Why a key of the sections that may be replaced has no meaning here.
_WHY = {
    "data.root": "the images that a run was trained on; --data names those of this measurement",
    "data.prefetch": "of training only",
    "eval.every_steps": "of evaluation while training",
    "eval.every_epochs": "of evaluation while training",
    "eval.root": "of evaluation while training; --data names the images of this measurement",
    "eval.images": "of evaluation while training; all images are read here, and --images says how many MRR ranks",
}


def overridden(words: Sequence[str]) -> set[str]:
    """The keys of ``key.path=value`` words."""
    return {word.partition("=")[0].strip() for word in words}


def check_overrides(words: Sequence[str], *, command: str, external: bool = False, what: Collection[str] = ()) -> None:
    """UserError for the first override that this measurement would not use.

    ``command``: evaluate, finetune or embed; ``external``: of a run on triplets; ``what``: that is measured. A key that
    no configuration has is left to the configuration, which names the nearest.
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
                f"command line: {word}: {command} may change {', '.join(allowed)} only; the rest is the run's"
            )


def for_evaluation(config: Config, words: Sequence[str]) -> Config:
    """The run's configuration for images that it was not trained on: their source is found by what is there, and data
    that are gone are not waited for, unless an override says otherwise.
    """
    keys = overridden(words)
    usual = {"source": "auto", "wait_s": 0.0}
    changed = {name: value for name, value in usual.items() if f"data.{name}" not in keys}
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def _allowed(command: str, external: bool, what: Collection[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The keys that are used, and why others are not."""
    if command in ("finetune", "embed"):
        return _IMAGES, {}
    if external:
        why = {
            "data.source": "of images; this run's data are triplets",
            "eval.mrr_images": "of images; of triplets, eval.bank or --images says how many next frames are ranked",
            **dict.fromkeys(_STORES, "of stores, and triplets are files of this machine"),
            **dict.fromkeys(_JITTER, "of images; a run on triplets has no jitter"),
        }
        allowed = _DATA
    else:
        why = {"eval.horizon": "of roll-outs, which need triplets"}
        allowed = (*_IMAGES, *_JITTER, "eval.bank")  # the report ranks a few banks whatever is measured
    here, elsewhere = (_readers(kind) for kind in (("triplets", "images") if external else ("images", "triplets")))
    for key, names in elsewhere.items():
        why.setdefault(key, f"of {' and '.join(names)}, which needs {'images' if external else 'triplets'}")
    why |= {key: f"of {' and '.join(names)}, which --what leaves out" for key, names in here.items()}
    return (*allowed, *(key for key, names in here.items() if set(names) & set(what))), why


def _readers(kind: Kind) -> dict[str, list[str]]:
    """By key of the configuration, the evaluations that read it on this kind of data."""
    found: dict[str, list[str]] = {}
    for one in evaluations(kind):
        how = one.on(kind)
        for key in how.settings if how is not None else ():
            found.setdefault(key, []).append(one.name)
    return found
