"""The copy of stage 3's parameters that the ranks of a host hold together (zero.hpz_partition_size).

DeepSpeed makes a rank's part of it when a parameter is first released after an update, and gathers from it, within the
host, until its optimizer's next step. It does not know of parameters that are written elsewhere (the EMA, a restored
checkpoint); `drop` discards their copies, so that the next gather is over all ranks again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

__all__ = ["drop", "join_group"]


def join_group(size: int) -> None:
    """Create this rank's group of ``size`` consecutive ranks for DeepSpeed's next engine; 1: none. All ranks call it.

    DeepSpeed's own way creates all groups on all ranks, world / size of them, each with a barrier of all ranks; and an
    engine takes the group of the engine before it, whatever its own configuration says.
    """
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # noqa: SLF001  (DeepSpeed has no public name)
    if size > 1:
        first = dist.get_rank() // size * size
        group = dist.new_group(list(range(first, first + size)), use_local_synchronization=True)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group  # noqa: SLF001


def drop(parameters: Iterable[nn.Parameter]) -> None:
    """Discard the copies of parameters whose shards were written. All ranks name the same ones, or they would gather
    from different groups.
    """
    for parameter in parameters:
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
