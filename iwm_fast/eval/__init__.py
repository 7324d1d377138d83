"""Evaluation of a run: its world model, its representation, and the page that shows both.

Names are loaded on first use: the command line's help reads `registry` and needs no torch for it. ``report`` is not
among them: it imports matplotlib, which evaluation during training does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iwm_fast.eval.evaluate import evaluate_model
    from iwm_fast.eval.online import join_shares, measure_share
    from iwm_fast.eval.splits import FileSplit, Split, TensorSplit, open_splits
    from iwm_fast.eval.world_model.examples import RankedExample, ranked_examples

__all__ = [
    "FileSplit",
    "RankedExample",
    "Split",
    "TensorSplit",
    "evaluate_model",
    "join_shares",
    "measure_share",
    "open_splits",
    "ranked_examples",
]

_HOMES = {
    "evaluate": ("evaluate_model",),
    "online": ("join_shares", "measure_share"),
    "splits": ("FileSplit", "Split", "TensorSplit", "open_splits"),
    "world_model.examples": ("RankedExample", "ranked_examples"),
}


def __getattr__(name: str) -> Any:
    """Return a public name, from its module."""
    for home, found in _HOMES.items():
        if name in found:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
