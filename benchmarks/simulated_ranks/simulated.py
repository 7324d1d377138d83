"""Simulated ranks of a large run: their descriptions, threads, and parts of a ViT-L's state by ZeRO stage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config
from iwm_fast.engine.checkpoint.index import equal_part
from iwm_fast.engine.distributed.rank_info import RankInfo
from iwm_fast.engine.optimizer import MOMENTS
from iwm_fast.models.iwm import IWM

__all__ = ["PER_HOST", "at_once", "described", "held_by", "state_shapes"]

Found = TypeVar("Found")

PER_HOST = 8
_LIMIT_S = 300.0


def described(world: int) -> tuple[RankInfo, ...]:
    """Return ranks on hosts of eight GPUs."""
    versions: dict[str, str | None] = {"torch": "2.13.0", "deepspeed": "0.19.8"}
    return tuple(
        RankInfo(r, f"node{r // PER_HOST:03d}", 1000 + r, "nccl", "NVIDIA H200", 8, 8, versions, f"GPU-{r:032x}")
        for r in range(world)
    )


def at_once(count: int, call: Callable[[int], Found]) -> list[Found]:
    """Call ``call(i)`` in a thread each, all together; return the results. Raises RuntimeError where one did not
    return.
    """
    found: dict[int, Found] = {}
    barrier = threading.Barrier(count)

    def run(i: int) -> None:
        barrier.wait()
        found[i] = call(i)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_LIMIT_S)
    if len(found) != count:
        raise RuntimeError(f"{count - len(found)} of {count} simulated ranks did not return")
    return [found[i] for i in range(count)]


def state_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return KIND/NAME → sizes of all that a checkpoint of this configuration holds; allocates nothing."""
    with torch.device("meta"):
        model = IWM(config.model, space_of(config.actions).dim)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        kinds = ("ema",) if name.startswith("target_encoder.") else ("weight", *MOMENTS)
        shapes |= {f"{kind}/{name}": tuple(parameter.shape) for kind in kinds}
    return shapes


def held_by(shapes: dict[str, tuple[int, ...]], rank: int, world: int, stage: int) -> dict[str, list[tuple[int, int]]]:
    """Return a rank's (start, length) of each tensor: an equal part of each at stages 0 and 3, else its slice of each
    kind's tensors in a row.
    """
    return dict(_dealt(shapes, rank, world) if stage in (0, 3) else _sliced(shapes, rank, world))


def _dealt(shapes: dict[str, tuple[int, ...]], rank: int, world: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    for tensor, shape in shapes.items():
        elements = torch.Size(shape).numel()
        part = equal_part(elements, world)
        if part * rank < elements:
            yield tensor, [(part * rank, min(part, elements - part * rank))]


def _sliced(shapes: dict[str, tuple[int, ...]], rank: int, world: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    kinds: dict[str, list[tuple[str, int]]] = {}
    for tensor, shape in shapes.items():
        kinds.setdefault(tensor.partition("/")[0], []).append((tensor, torch.Size(shape).numel()))
    for tensors in kinds.values():
        part = equal_part(sum(elements for _, elements in tensors), world)
        at = 0
        for tensor, elements in tensors:
            a, b = max(part * rank, at), min(part * (rank + 1), at + elements)
            if a < b:
                yield tensor, [(a - at, b - a)]
            at += elements
