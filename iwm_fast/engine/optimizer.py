"""AdamW with the field's parameter groups, and a finite check for the stage at which DeepSpeed makes none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from iwm_fast.config import TrainConfig
from iwm_fast.models.decay import decayed_parameters

__all__ = [
    "MOMENTS",
    "FiniteAdamW",
    "FiniteLamb",
    "build_optimizer",
    "ensure_state",
    "parameter_groups",
    "set_hyperparameters",
]

MOMENTS = ("exp_avg", "exp_avg_sq")


class FiniteAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments alone when a gradient is not finite.

    Used at ZeRO stage 0, where DeepSpeed steps a client optimizer as it is. ``overflow`` and ``_global_grad_norm``
    are the names under which DeepSpeed's engine looks for the outcome (``DeepSpeedEngine._take_model_step``).
    """

    def __init__(self, params: Any, *, clip: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.clip = clip
        self.overflow = False
        self._global_grad_norm: float = 0.0

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Check, clip, then update. The norm kept for the log is the one before clipping."""
        if closure is not None:
            raise ValueError("closure is not supported")
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = float(norm)  # the one place where the host waits for the device in a step
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if self.clip > 0.0:
            torch.nn.utils.clip_grads_with_norm_(
                [p for group in self.param_groups for p in group["params"]], self.clip, norm
            )
        self._move()

    def _move(self) -> None:
        super().step()


class FiniteLamb(FiniteAdamW):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2) for large batches.

    AdamW's direction with its decay, scaled for each decayed tensor by ‖w‖ / ‖direction‖; biases, norms and the mask
    token, which are not decayed, are not scaled either. The moments are AdamW's, so checkpoints are the same. On the
    CPU and the GPU alike; at ZeRO stage 0, because the norms are of whole tensors.
    """

    @torch.no_grad()
    def _move(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads: list[torch.Tensor] = [p.grad for p in weights if p.grad is not None]
            ensure_state(self, weights)
            first, second = ([self.state[p][key] for p in weights] for key in MOMENTS)
            (beta1, beta2), counts = group["betas"], [self.state[p]["step"] for p in weights]
            torch._foreach_add_(counts, 1.0)
            torch._foreach_lerp_(first, grads, 1.0 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1.0 - beta2)
            count = counts[0].double()  # on the device: reading it would make the host wait
            direction = torch._foreach_div(first, 1.0 - beta1**count)  # noqa: SLF001  (has no public name)
            size = torch._foreach_sqrt(torch._foreach_div(second, 1.0 - beta2**count))  # noqa: SLF001
            torch._foreach_add_(size, group["eps"])
            torch._foreach_div_(direction, size)
            if group["decayed"]:
                torch._foreach_add_(direction, weights, alpha=group["weight_decay"])
                norms = torch._foreach_norm(weights), torch._foreach_norm(direction)  # noqa: SLF001
                torch._foreach_mul_(direction, _trust(*norms))
            torch._foreach_add_(weights, direction, alpha=-group["lr"])


def _trust(weights: Sequence[torch.Tensor], directions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """‖w‖ / ‖direction‖, and 1 where either is 0."""
    return [torch.where((w > 0) & (d > 0), w / d, torch.ones_like(w)) for w, d in zip(weights, directions, strict=True)]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: decayed, and not, by `models.decay`."""
    decays = decayed_parameters(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if decays[name]]
    plain = [p for name, p in trainable if not decays[name]]
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, train: TrainConfig, stage: int) -> torch.optim.AdamW:
    """AdamW, or LAMB at stage 0, over the groups of the trainable parameters.

    PyTorch's fused implementation of AdamW serves the CPU and the GPU, so no compiler is needed; DeepSpeed's LAMB wants
    one, and a GPU.
    """
    groups = parameter_groups(model)
    # lr and weight decay are set before each step; until then nothing can move.
    if stage == 0:
        kind = FiniteLamb if train.optimizer == "lamb" else FiniteAdamW
        return kind(groups, clip=train.clip, lr=0.0, betas=train.betas, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write this step's values into the groups; undecayed groups keep 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def ensure_state(optimizer: torch.optim.Optimizer, tensors: Sequence[torch.Tensor], step: int | None = None) -> None:
    """Create AdamW's state for ``tensors`` where it is missing and set its count of updates to ``step``, if given."""
    for tensor in tensors:
        state = optimizer.state[tensor]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format, requires_grad=False)
        if step is None and "step" in state:
            continue
        state["step"] = torch.full((), float(step or 0), dtype=torch.float32, device=tensor.device)
