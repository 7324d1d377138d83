"""Messages between ranks that open few connections, and are not pickled.

At a thousand ranks a broadcast's tree or a barrier's butterfly connects a rank to ten or twenty others. All-reduce and
all-gather go round a ring: two neighbours each. Only the first rank, to which reports go, is connected to all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["bytes_of_first", "meet_all", "reports_to_first"]


def bytes_of_first(mine: bytes, rank: int, world: int, group: dist.ProcessGroup | None = None) -> bytes:
    """Return the first rank's bytes on all ranks, which all call it; the others' are not sent."""
    if world == 1:
        return mine
    length = torch.tensor([len(mine) if rank == 0 else 0])
    dist.all_reduce(length, group=group)
    text = torch.zeros(int(length), dtype=torch.uint8)
    if rank == 0:
        text[:] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else 0
    if text.numel():
        dist.all_reduce(text, group=group)
    return text.numpy().tobytes()


def reports_to_first(mine: bytes, rank: int, world: int, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Return every rank's bytes, by rank, on the first rank, and an empty list on the others; all ranks call it."""
    if world == 1:
        return [mine]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(mine.ljust(longest + 1)), dtype=torch.uint8)
    found = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
    dist.gather(padded, found, dst=0, group=group)
    if found is None:
        return []
    return [text.numpy().tobytes()[: int(length)] for text, length in zip(found, lengths, strict=True)]


def meet_all(world: int, group: dist.ProcessGroup | None = None) -> None:
    """Return when all ranks have called it."""
    if world > 1:
        dist.all_reduce(torch.zeros(1), group=group)
