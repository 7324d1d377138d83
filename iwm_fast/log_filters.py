"""Filter known, harmless messages of other packages that would bury ours; each is listed."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet_third_parties"]

_KNOWN = {
    # xformers' wheel is built for one torch; `iwm-fast doctor` says which of its operators run.
    "xformers": ("WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions",),
    # DeepSpeed on a machine without a GPU: pretrain prints its device itself. At stage 3 its hooks look for tensors in
    # the inputs and outputs of a module and do not know our Segments and IWMOutput: every module with parameters also
    # takes and returns tensors, and the whole model has no parameters of its own.
    "DeepSpeed": ("Setting accelerator to CPU", "A module has unknown inputs or outputs type (<class 'iwm_fast."),
}


class _Known(logging.Filter):
    """Drops records that begin with one of the given texts."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginnings)


def quiet_third_parties() -> None:
    """Install the filters; call this before importing xformers or deepspeed, which log on import."""
    for name, beginnings in _KNOWN.items():
        logger = logging.getLogger(name)
        if not any(isinstance(old, _Known) for old in logger.filters):
            logger.addFilter(_Known(beginnings))
    # DeepSpeed calls collectives by names that every supported torch has; torch 2.13 has newer ones.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
