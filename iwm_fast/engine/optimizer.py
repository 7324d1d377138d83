"""AdamW whose norm, finite check, clipping and update stay on the device, so that the host never waits: the base of the
other optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwm_fast.config.registry import OPTIMIZERS, Optimizer
from iwm_fast.errors import UserError
from iwm_fast.kernels._lib.backend import launches_recorded
from iwm_fast.models.decay import decayed_parameters

__all__ = [
    "MOMENTS",
    "FiniteAdamW",
    "GroupTensors",
    "ensure_state",
    "parameter_groups",
    "register_optimizer",
    "set_hyperparameters",
    "zero_unless",
]

Kind = TypeVar("Kind", bound=type["FiniteAdamW"])
MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements of one sum of squares on a CPU, and how many of them a tensor has at least to be divided.
_ROW, _ROWS = 1024, 64


class GroupTensors(NamedTuple):
    """Of one group, as many in each list."""

    weights: list[Tensor]
    grads: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    counts: list[Tensor]


class FiniteAdamW(torch.optim.AdamW):
    """AdamW that skips the update where a gradient is not finite, decided on the device.

    ``found_inf`` is 1.0 after a skipped step, else 0.0; ``_global_grad_norm`` is the norm before clipping. Both are
    scalars on the device, new ones for each step. DeepSpeed's engine reads ``overflow`` and ``_global_grad_norm`` by
    these names (``DeepSpeedEngine._take_model_step``).

    ``divided``: the process group over which one gradient is sharded, or None. ``copies``: the number of ranks whose
    gradients are summed, to divide by. ``parts``: views of a flat weight that share its gradient.
    """

    def __init__(self, params: Any, *, clip: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.clip = clip
        self.divided: dist.ProcessGroup | None = None
        self.copies = 1
        self.parts: dict[Tensor, list[Tensor]] = {}
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.overflow = False  # DeepSpeed would count a step as skipped; `SkippedSteps` does
        self._global_grad_norm: Tensor | float = 0.0
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update with the mean gradient, clipped, or skip the step."""
        if closure is not None:
            raise ValueError("closure is not supported")
        tensors = [self._tensors(group) for group in self.param_groups]
        norm = self._norm([grad for own in tensors for grad in own.grads])
        moved = (norm < torch.inf).float()  # neither infinity nor NaN is less
        self._global_grad_norm, self.found_inf = norm, 1.0 - moved
        scale = None  # what the gradients are divided by
        if self.clip > 0.0:
            scale = ((norm + 1e-6) / self.clip).clamp_min(1.0)
        if self.copies > 1:
            scale = torch.full_like(norm, self.copies) if scale is None else scale * self.copies
        for count in {id(count): count for own in tensors for count in own.counts}.values():
            count.add_(moved)
        for group, own in zip(self.param_groups, tensors, strict=True):
            if own.weights:
                self.move(group, own, self.found_inf, scale)

    def _tensors(self, group: dict[str, Any]) -> GroupTensors:
        """The step's tensors of a group; weights without a gradient are left out."""
        found = GroupTensors([], [], [], [], [])
        for weight in group["params"]:
            parts = self.parts.get(weight, (weight,))
            if all(part.grad is None for part in parts):
                continue
            if weight not in self.state:
                ensure_state(self, [weight])
            state = self.state[weight]
            moments = [[state[key]] for key in MOMENTS]
            if weight in self.parts:
                moments = [self._divided(weight, state[key]) for key in MOMENTS]
            for part, first, second in zip(parts, *moments, strict=True):
                if part.grad is not None:
                    found.weights.append(part)
                    found.grads.append(part.grad)
                    found.first.append(first)
                    found.second.append(second)
                    found.counts.append(state["step"])
        return found

    def _divided(self, weight: Tensor, moment: Tensor) -> list[Tensor]:
        """Views of a flat weight's moment, one per part."""
        known = self._views.get(id(moment))
        if known is None or known[0] is not moment:
            begins = [(p.data_ptr() - weight.data_ptr()) // weight.element_size() for p in self.parts[weight]]
            views = [
                moment[at : at + p.numel()].view(p.shape) for at, p in zip(begins, self.parts[weight], strict=True)
            ]
            known = self._views[id(moment)] = (moment, views)
        return known[1]

    def _norm(self, grads: Sequence[Tensor]) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(torch.stack(tuple(_norms(grads))))
        if self.divided is not None:
            square: Tensor = norm.square()
            dist.all_reduce(square, group=self.divided)
            norm = square.sqrt()
        return norm / self.copies if self.copies > 1 else norm

    def move(self, group: dict[str, Any], own: GroupTensors, found_inf: Tensor, scale: Tensor | None) -> None:
        """Update one group, unless ``found_inf`` is 1.0; ``scale`` divides the gradients.

        Override it for another rule, which never waits for the device. The two moments and the count of updates, which
        includes this one, are saved and resumed as AdamW's.
        """
        torch._fused_adamw_(
            own.weights, own.grads, own.first, own.second, [], own.counts,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False, grad_scale=scale, found_inf=found_inf,
        )  # fmt: skip


def _norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The norm of each tensor. On a CPU torch sums squares in few partial sums, which is off by 1e-3 at 30 million
    elements.
    """
    if tensors[0].device.type != "cpu" or launches_recorded():
        return torch._foreach_norm(tuple(tensors))  # noqa: SLF001  (has no public name)
    norms = []
    for tensor in tensors:
        flat, rows = tensor.reshape(-1), tensor.numel() // _ROW
        if rows < _ROWS:
            norms.append(torch.linalg.vector_norm(flat))
            continue
        parts = torch.linalg.vector_norm(flat[: rows * _ROW].view(rows, _ROW), dim=1)
        rest = torch.linalg.vector_norm(flat[rows * _ROW :])
        norms.append(torch.hypot(_norms([parts])[0], rest))
    return norms


def zero_unless(moved: Tensor, grads: Sequence[Tensor]) -> None:
    """Set gradients, fp32, to 0 in place where ``moved`` is 0.0, NaN and infinity too; where it is 1.0 they stay."""
    # NaN · 0 is NaN, but as an integer 0 has the bits of 0.0.
    torch._foreach_mul_([grad.view(torch.int32) for grad in grads], moved.to(torch.int32))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups of the trainable parameters, with and without decay, by `models.decay`."""
    decays = decayed_parameters(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if decays[name]]
    plain = [p for name, p in trainable if not decays[name]]
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False, "weight_decay": 0.0}]


def register_optimizer(name: str, *, whole_tensors: bool = False) -> Callable[[Kind], Kind]:
    """Register the decorated class, a `FiniteAdamW` with another `move`, as ``train.optimizer=NAME``.

    whole_tensors: its update reads whole tensors (a norm, a matrix), so that it needs zero.stage 0; else it is
    elementwise, and stages 1 and 2 give it flat shards. UserError where the name is taken, and for another class.
    """

    def registered(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, FiniteAdamW)):
            raise UserError(f"optimizer {name}: {kind!r} is no subclass of FiniteAdamW; derive it and override move")
        OPTIMIZERS.add(name, Optimizer(kind, whole_tensors))
        return kind

    return registered


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's values in the groups; groups without decay keep 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def ensure_state(optimizer: torch.optim.Optimizer, tensors: Sequence[torch.Tensor], step: int | None = None) -> None:
    """Create AdamW's state for ``tensors`` where it is missing, and set its count of updates to ``step``, if given.

    `FiniteAdamW` shares one count among all its tensors.
    """
    shared: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        state = optimizer.state[tensor]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format, requires_grad=False)
        if step is None and "step" in state:
            continue
        if tensor.device not in shared or not isinstance(optimizer, FiniteAdamW):
            shared[tensor.device] = torch.full((), float(step or 0), dtype=torch.float32, device=tensor.device)
        state["step"] = shared[tensor.device]
