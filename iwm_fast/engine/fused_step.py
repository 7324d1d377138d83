"""DeepSpeed's ZeRO stages 1 and 2 with `FiniteAdamW`'s step: no launch and no host work for each parameter.

DeepSpeed's own step takes a norm, looks for infinities and copies, parameter by parameter, and reads results back. Here
each group's gradient is one flat tensor before the norm is taken, and nothing is read back. Dividing, reducing and
gathering stay DeepSpeed's where there are several ranks. On a rank alone nothing is reduced, so its gradient hooks are
not registered; in fp32 the master weights are then the model's own memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, all_gather_dp_groups
from torch import Tensor

from iwm_fast.engine.optimizer import FiniteAdamW
from iwm_fast.errors import UserError

__all__ = ["FusedZero", "fused_zero"]

# The releases whose stage_1_and_2.py has the methods and names that FusedZero overrides and uses.
KNOWN = "0.19."


class FusedZero(DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` with another step, and without gradient hooks on a rank alone."""

    @property
    def alone(self) -> bool:
        """Whether one rank holds everything."""
        return all(count == 1 for count in self.partition_count)

    def initialize_optimizer_states(self) -> None:
        """Choose what the optimizer updates, before DeepSpeed links parameters to it. Moments are made later."""
        super().initialize_optimizer_states()
        optimizer: FiniteAdamW = self.optimizer
        if not self.alone:
            optimizer.divided = self.dp_process_group
        elif self.dtype == torch.float32:
            for i, master in enumerate(self.single_partition_of_fp32_groups):
                master.data = self.bit16_groups_flat[i]
                optimizer.parts[master] = self.bit16_groups[i]

    def create_gradient_handling_hooks(self) -> None:
        """Register DeepSpeed's hooks, which divide and reduce, where there are other ranks."""
        if self.alone:
            self._remaining_grad_acc_hooks = 0
        else:
            super().create_gradient_handling_hooks()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stage 1, after a step's last backward pass."""
        if not self.alone:
            super().reduce_gradients(pipeline_parallel)

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Stage 2, after each backward pass."""
        if not self.alone:
            super().overlapping_partition_gradients_reduce_epilogue()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update this rank's part of the weights, and bring the model's working copy to them."""
        if closure is not None:
            raise ValueError("closure is not supported")
        self.micro_step_id = -1
        shared = self.alone and self.dtype == torch.float32
        if not shared:
            for i, partition in enumerate(self.single_partition_of_fp32_groups):
                partition.grad = self._flat_gradient(i)
        self.optimizer.step()
        self._global_grad_norm = self.optimizer._global_grad_norm  # noqa: SLF001  (DeepSpeed's name for it)
        if shared:
            return
        for i, partition in enumerate(self.single_partition_of_fp32_groups):
            partition.grad = None
            rank = torch.distributed.get_rank(group=self.real_dp_process_group[i])
            self.parallel_partitioned_bit16_groups[i][rank].copy_(partition)
        if not self.alone:
            all_gather_dp_groups(
                groups_flat=self.bit16_groups_flat,
                partitioned_param_groups=self.parallel_partitioned_bit16_groups,
                dp_process_group=self.real_dp_process_group,
                start_alignment_factor=self.nccl_start_alignment_factor,
                allgather_bucket_size=self.allgather_bucket_size,
            )

    def _flat_gradient(self, i: int) -> Tensor:
        """Return the gradient of this rank's part of group ``i``: fp32, flat, padded with zeros to its length."""
        length = int(self.partition_size[i])
        if self.alone:
            found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.bit16_groups[i]]
        else:
            found = list(self.averaged_gradients[i])
            self.averaged_gradients[i] = self.all_grad_tensors[i] = None
        rest = length - sum(gradient.numel() for gradient in found)
        if rest:
            found.append(found[0].new_zeros(rest))
        flat: Tensor = self.flatten(found)
        del found
        for parameter in self.bit16_groups[i]:
            parameter.grad = None  # before the fp32 copy is made, which takes twice as much
        return flat.float()


@contextlib.contextmanager
def fused_zero() -> Iterator[None]:
    """Let DeepSpeed's engine make a `FusedZero` wherever it would make its own optimizer of stage 1 or 2.

    Raises UserError where DeepSpeed is of a release that FusedZero is not written for.
    """
    if not deepspeed.__version__.startswith(KNOWN):
        raise UserError(
            f"deepspeed is {deepspeed.__version__}; zero.stage 1 and 2 work inside {KNOWN}x: install one of those, "
            "or set zero.stage to 0 or 3"
        )
    plain = deepspeed_engine.DeepSpeedZeroOptimizer
    deepspeed_engine.DeepSpeedZeroOptimizer = FusedZero
    try:
        yield
    finally:
        deepspeed_engine.DeepSpeedZeroOptimizer = plain
