"""Count calls, FLOPs and bytes by operator and by module, in torch's dispatcher."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

__all__ = ["OperationCounter", "Work"]


@dataclass
class Work:
    """calls; operations: FLOPs of matmuls; bytes of tensors read and written, counted per operator.

    sizes: the number of calls of each (operations, bytes).
    """

    calls: int = 0
    operations: int = 0
    bytes: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, operations: int, size: int) -> None:
        """Add one call."""
        self.calls += 1
        self.operations += operations
        self.bytes += size
        self.sizes[operations, size] += 1


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _cpu_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of four matmuls: for the gradients of q, k, v and of the weights, without recomputation."""
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)) * 4 // 5


# torch has no formula for these. Its formula of a fused backward pass counts the recomputed matmul too.
_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _cpu_attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_attention_backward,
}


# Allocate or alias memory; no bytes are read or written.
_STILL = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
        "lift_fresh", "resize_", "set_",
    )
)  # fmt: skip
# Write values that do not come from a tensor: their arguments give the shape only.
_MADE = frozenset(
    f"aten::{name}"
    for name in ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full",
                 "arange", "zero_", "fill_")
)  # fmt: skip
# Read as much of their first tensor as they write; the other tensors are indices.
_GATHERED = frozenset(f"aten::{name}" for name in ("index_select", "index", "gather", "embedding"))


def _moved(name: str, given: Any, out: Any) -> int:
    """Return the bytes that an operator reads and writes, each tensor once."""
    if name in _STILL:
        return 0
    made = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
    tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    if name in _MADE:
        tensors = []
    elif name in _GATHERED:
        return 2 * sum(t.nbytes for t in made.values()) + sum(t.nbytes for t in tensors[1:])
    return sum(t.nbytes for t in (made | {id(t): t for t in tensors}).values())


class OperationCounter(TorchDispatchMode):
    """Count while active. `by_operator`: by name, "aten::addmm". `by_module`: by path, with a module's submodules.

    Views are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: dict[str, Work] = defaultdict(Work)
        self.by_module: dict[str, Work] = defaultdict(Work)
        self._modules = ModuleTracker()

    def modules_of(self, name: str) -> dict[str, Work]:
        """Return `by_module` with paths relative to the module that has `name`, without the wrappers around it."""
        ends = [path for path in self.by_module if path.endswith(f".{name}")]
        prefix = min(ends, key=len).removesuffix(name) if ends else ""
        return {path.removeprefix(prefix): work for path, work in self.by_module.items() if path.startswith(prefix)}

    def __enter__(self) -> OperationCounter:
        self._modules.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modules.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        name, operations = func.name().partition(".")[0], 0
        formula: Any = flop_registry.get(func.overloadpacket)
        if name in _FORMULAS:
            operations = _FORMULAS[name](*args, **(kwargs or {}))
        elif formula is not None:
            operations = formula(*args, **(kwargs or {}), out_val=out)
        size = _moved(name, (args, kwargs), out)
        self.by_operator[name].add(int(operations), size)
        for path in self._modules.parents:
            self.by_module[path].add(int(operations), size)
        return out
