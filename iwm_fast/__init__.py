"""iwm-fast: a training engine for Image World Models (arXiv:2403.00504)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iwm_fast.parent_process import BORN  # first: the other imports take seconds
from iwm_fast.version import __version__

if TYPE_CHECKING:
    from os import PathLike

    from iwm_fast.api import FinetunedModel, WorldModel

__all__ = ["BORN", "__version__", "load"]


def load(
    run_or_export: str | PathLike[str], *, checkpoint: str = "latest", device: str | None = None
) -> WorldModel | FinetunedModel:
    """Load a trained world model (`iwm_fast.api.WorldModel`): `encode`, `predict`, `rank`, `infer`, `plan`.

    A finetuned result has `encode`, `classify`, `segment` (`iwm_fast.api.FinetunedModel`).

    Images are paths, PIL images, uint8 arrays or tensors (S, S, 3), or lists of these; actions are physical values by
    name, or vectors; results are float32 tensors. An action outside of what training sampled gives a warning.

    ``run_or_export``: a folder of ``iwm-fast pretrain``, ``iwm-fast export`` or ``iwm-fast finetune``. ``checkpoint``:
    of a run, latest or a name such as step_000500. ``device``: "cpu", "cuda", "cuda:1"; default: the GPU if there is
    one. Raises `iwm_fast.errors.UserError` where the folder is none of these, or damaged.
    """
    from pathlib import Path

    from iwm_fast.errors import UserError

    if not isinstance(run_or_export, str | os.PathLike):
        raise UserError(
            f"run_or_export is {run_or_export!r}: give the folder of a run, an export or a finetuned result"
        )
    from iwm_fast.api import open_model  # keeps `import iwm_fast` free of torch and DALI

    return open_model(Path(run_or_export), checkpoint=checkpoint, device=device)
