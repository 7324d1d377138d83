"""Messages of other packages that are known, harmless here and would bury ours.

Each is named; nothing is silenced whole.
"""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet_third_parties"]

_KNOWN = {
    # xformers' wheel is built for one torch; which of its operators run is what `iwm-fast doctor` says.
    "xformers": ("WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions",),
    # DeepSpeed on a machine without a GPU: pretrain says its device itself.
    # At stage 3 its hooks look for tensors in what goes in and out of a module, and not in our Segments and IWMOutput:
    # every module with parameters of its own also takes and gives tensors, and the whole model has none.
    "DeepSpeed": ("Setting accelerator to CPU", "A module has unknown inputs or outputs type (<class 'iwm_fast."),
}


class _Known(logging.Filter):
    """Drops the records that begin with one of the given texts."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginnings)


def quiet_third_parties() -> None:
    """Call before xformers or deepspeed is imported: these messages come while they are."""
    for name, beginnings in _KNOWN.items():
        logger = logging.getLogger(name)
        if not any(isinstance(old, _Known) for old in logger.filters):
            logger.addFilter(_Known(beginnings))
    # DeepSpeed calls collectives by the names that every supported torch has; 2.13 has newer ones.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
