"""DeepSpeed's ZeRO stages 1 and 2 with `FiniteAdamW`'s step: no launch and no host work per parameter.

DeepSpeed's own step computes norms, looks for infinities and copies parameter by parameter, and reads results back.
Here each group's gradient is one flat tensor before the norm, and nothing is read back. Sharding, reducing and
gathering stay DeepSpeed's on several ranks. A rank alone reduces nothing, so its gradient hooks are not registered; in
fp32 the master weights are then the model's own memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, all_gather_dp_groups
from torch import Tensor, nn

from iwm_fast.engine.optimizer import FiniteAdamW
from iwm_fast.errors import UserError

__all__ = ["FusedZero", "fused_zero"]

# Releases whose stage_1_and_2.py has the methods and names that FusedZero overrides and uses.
KNOWN = "0.19."


class FusedZero(DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` with another step, and without gradient hooks on a rank alone.

    due: whether the backward pass that runs is a step's last one, once the engine is there to say so. at_the_end: send
    nothing before the pass has ended, and then in the parameters' order: with CUDA graphs, where gradients come in
    another order from a replay than from a pass that is not captured yet, and a rank may be in either.
    """

    due: Callable[[], bool] | None = None
    at_the_end = False
    overlap_comm: bool

    def is_gradient_accumulation_boundary(self) -> bool:
        """Read by hooks before they send. DeepSpeed sets its optimizer's after the pass, or by hooks on tensor outputs,
        which the model lacks.
        """
        return super().is_gradient_accumulation_boundary() if self.due is None else self.due()

    @property
    def alone(self) -> bool:
        """Whether one rank holds everything."""
        return all(count == 1 for count in self.partition_count)

    def initialize_optimizer_states(self) -> None:
        """Choose what the optimizer updates, before DeepSpeed links parameters to it. Moments come later."""
        super().initialize_optimizer_states()
        optimizer: FiniteAdamW = self.optimizer
        if not self.alone:
            optimizer.divided = self.dp_process_group
        elif self.dtype == torch.float32:
            for i, master in enumerate(self.single_partition_of_fp32_groups):
                master.data = self.bit16_groups_flat[i]
                optimizer.parts[master] = self.bit16_groups[i]

    def create_gradient_handling_hooks(self) -> None:
        """Register DeepSpeed's hooks, which shard and reduce, where there are other ranks."""
        if self.alone:
            self._remaining_grad_acc_hooks = 0
        else:
            super().create_gradient_handling_hooks()

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Handle a gradient of group ``i`` in a hook."""
        if not self.at_the_end:
            super().process_gradients(param, i)

    def clear_grad_attribute(self, param: nn.Parameter) -> None:
        """Drop a gradient. One larger than a bucket is sent in place: its memory waits for that."""
        large = param.numel() > self.reduce_bucket_size and self.overlap_comm and self.reduction_stream is not None
        if large and param.grad is not None:
            param.grad.record_stream(self.reduction_stream)
        super().clear_grad_attribute(param)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stage 1, after a step's last backward pass."""
        if not self.alone:
            super().reduce_gradients(pipeline_parallel)

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Stage 2 after each backward pass, and the end of stage 1's sums."""
        if self.alone:
            return
        if self.at_the_end:
            for i, group in enumerate(self.bit16_groups):
                for parameter in group:
                    if parameter.grad is not None:
                        super().process_gradients(parameter, i)
        super().overlapping_partition_gradients_reduce_epilogue()

    def independent_gradient_partition_epilogue(self) -> None:
        """Send the last bucket, and keep this rank's part of the sums.

        DeepSpeed's host waits for the whole device here where buckets were sent on their own stream. Here the computing
        stream waits for that one, and sends the last bucket itself: nothing is left to overlap with.
        """
        overlap, self.overlap_comm = self.overlap_comm, False
        if overlap and self.reduction_stream is not None:
            get_accelerator().current_stream().wait_stream(self.reduction_stream)
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.overlap_comm = overlap

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update this rank's part of the weights, and refresh the model's working copy."""
        if closure is not None:
            raise ValueError("closure is not supported")
        self.micro_step_id = -1
        shared = self.alone and self.dtype == torch.float32
        if not shared:
            for i, partition in enumerate(self.single_partition_of_fp32_groups):
                partition.grad = self._flat_gradient(i)
        self.optimizer.step()
        self._global_grad_norm = self.optimizer._global_grad_norm  # noqa: SLF001  (DeepSpeed's name for it)
        if not shared:
            for partition in self.single_partition_of_fp32_groups:
                partition.grad = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write this rank's fp32 weights into the model's working copy, and gather the others' parts of it."""
        if self.alone and self.dtype == torch.float32:
            return  # one memory
        for i, partition in enumerate(self.single_partition_of_fp32_groups):
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
            parameter.grad = None  # before the fp32 copy, which needs twice as much
        return flat.float()


@contextlib.contextmanager
def fused_zero() -> Iterator[None]:
    """Make DeepSpeed's engine create a `FusedZero` instead of its own optimizer of stage 1 or 2.

    Raises UserError for a release of DeepSpeed that FusedZero does not support.
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
