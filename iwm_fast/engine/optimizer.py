"""AdamW with the field's parameter groups, and a finite check for the stage at which DeepSpeed makes none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from iwm_fast.config import TrainConfig

__all__ = ["FiniteAdamW", "build_optimizer", "ensure_state", "set_hyperparameters"]

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
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.clip > 0.0:
            torch.nn.utils.clip_grads_with_norm_(
                [p for group in self.param_groups for p in group["params"]], self.clip, norm
            )
        super().step()


def build_optimizer(model: nn.Module, train: TrainConfig, stage: int) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases, norms and the mask token are not decayed.

    PyTorch's fused implementation serves the CPU and the GPU, so no compiler is needed.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if p.ndim > 1 and not name.endswith("bias")]
    plain = [p for name, p in trainable if p.ndim <= 1 or name.endswith("bias")]
    groups = [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False, "weight_decay": 0.0}]
    # lr and weight decay are set before each step; until then nothing can move.
    if stage == 0:
        return FiniteAdamW(groups, clip=train.clip, lr=0.0, betas=train.betas, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write this step's values into the groups; undecayed groups keep 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def ensure_state(optimizer: torch.optim.Optimizer, tensors: list[torch.Tensor], step: int) -> None:
    """Create AdamW's state for ``tensors`` where it is missing and set its count of updates to ``step``."""
    for tensor in tensors:
        state = optimizer.state[tensor]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format, requires_grad=False)
        state["step"] = torch.full((), float(step), dtype=torch.float32, device=tensor.device)
