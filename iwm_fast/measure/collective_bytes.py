"""Count the bytes of collectives in torch's dispatcher, whether DeepSpeed or the engine calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iwm_fast.cost.communication import Kind, ring_bytes

__all__ = ["CollectiveCounter", "CountedCollective"]

# torch's operators behind torch.distributed's functions.
_KINDS: dict[str, Kind] = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}
_NOTHING_MOVED = {"barrier", "monitored_barrier_"}


@dataclass(frozen=True)
class CountedCollective:
    """One call. kind: of the operator, or its own name if it is none of the three. size: bytes of the whole tensor.
    ranks: of its group.
    """

    kind: str
    size: int
    ranks: int


class CollectiveCounter(TorchDispatchMode):
    """Record every collective of this process while active, also in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[CountedCollective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            if name not in _NOTHING_MOVED:
                # Result and parts are both among the arguments; the largest is the whole tensor.
                tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
                largest = max((t.numel() * t.element_size() for t in tensors), default=0)
                self.calls.append(CountedCollective(_KINDS.get(name, name), largest, _group_size(args)))
        return func(*args, **(kwargs or {}))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the whole tensors, by kind."""
        found: dict[str, int] = {}
        for call in self.calls:
            found[call.kind] = found.get(call.kind, 0) + call.size
        return found

    def sent(self) -> float:
        """Return the bytes that this rank sends in rings through its groups. Raise ValueError for a call without a
        ring formula.
        """
        total = 0.0
        for call in self.calls:
            if call.kind not in ("all_reduce", "all_gather", "reduce_scatter"):
                raise ValueError(f"{call.kind} was called; it has no ring formula")
            total += ring_bytes(call.kind, call.size, call.ranks)  # type: ignore[arg-type]
        return total


def _group_size(arguments: tuple[Any, ...]) -> int:
    """The number of ranks of the process group among an operator's arguments."""
    boxes = (a for a in tree_leaves(arguments) if isinstance(a, torch.ScriptObject))
    group = next(box for box in boxes if str(box._type()).endswith("c10d.ProcessGroup"))  # noqa: SLF001
    return dist.ProcessGroup.unbox(group).size()
