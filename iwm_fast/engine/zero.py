"""DeepSpeed's engine around a model; this module alone knows how each ZeRO stage lays out a rank's shard."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from iwm_fast.config import Config, TrainConfig
from iwm_fast.config.registry import OPTIMIZERS
from iwm_fast.cost.memory import BUCKET_BYTES
from iwm_fast.engine import host_copies
from iwm_fast.engine.bf16 import Bf16Compute
from iwm_fast.engine.graphs import CudaRecorder, GraphedStep
from iwm_fast.engine.lamb import FiniteLamb
from iwm_fast.engine.muon import FiniteMuon
from iwm_fast.engine.optimizer import MOMENTS, FiniteAdamW, ensure_state, parameter_groups
from iwm_fast.engine.overlap import SummedGradients
from iwm_fast.errors import UserError
from iwm_fast.models.iwm import IWM

__all__ = ["Shard", "ZeroEngine", "deepspeed_config", "initialize"]


@dataclass(frozen=True)
class Shard:
    """One rank's contiguous part of one trainable parameter: views into the optimizer's own memory, fp32, 1-D.

    ``start`` is an offset into the flattened parameter; ``weight`` and ``moments`` have the same length.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    moments: dict[str, Tensor]

    @property
    def stop(self) -> int:
        """Offset one past the last element."""
        return self.start + self.weight.numel()


@dataclass
class ZeroEngine:
    """DeepSpeed's engine, and the parts of it that the loop uses."""

    engine: Any
    optimizer: torch.optim.Optimizer
    stage: int
    module: nn.Module
    shards: list[Shard]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the trainable parameters, by name

    @property
    def found_inf(self) -> Tensor:
        """1.0 where the last step was skipped because a gradient was not finite, else 0.0; a scalar on the device."""
        if isinstance(self.optimizer, FiniteAdamW) and self.optimizer.found_inf is not None:
            return self.optimizer.found_inf
        overflow = float(self.engine.optimizer.overflow)
        return torch.full((), overflow, dtype=torch.float32, device=self.shards[0].weight.device)

    @property
    def graphed(self) -> GraphedStep | None:
        """The replay of forward and backward, with train.cuda_graph."""
        module = self.engine.module
        return module if isinstance(module, GraphedStep) else None

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping. The host waits for the device."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def set_updates(self, count: int) -> None:
        """Tell AdamW how many updates its moments have seen (its bias correction depends on it)."""
        if self.stage == 3:  # stage 3 puts its sub-groups into the optimizer one at a time, and only while it steps
            tensors = list(self.engine.optimizer.fp32_partitioned_groups_flat)
        else:
            tensors = [p for group in self.optimizer.param_groups for p in group["params"]]
        ensure_state(self.optimizer, tensors, count)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the shards' fp32 weights into the copies that the model computes with; all ranks call it."""
        if self.stage in (1, 2):
            self.engine.optimizer.refresh()
        elif self.stage == 3:
            parameters = dict(self.module.named_parameters())
            for shard in self.shards:
                working = parameters[shard.name].ds_tensor  # type: ignore[attr-defined]
                working.data.view(-1)[: shard.weight.numel()].copy_(shard.weight)
            host_copies.drop(parameters[name] for name in self.shapes)


def deepspeed_config(config: Config, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Return DeepSpeed's JSON: the packaged base of the stage, and what follows from the configuration."""
    base = resources.files("iwm_fast.configs").joinpath(f"deepspeed/zero{config.zero.stage}.json")
    settings: dict[str, Any] = json.loads(base.read_text())
    settings |= {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Below stage 3 FiniteAdamW clips, which needs the norm anyway.
        "gradient_clipping": config.train.clip if config.zero.stage == 3 else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would make the host wait for the device twice per step.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.zero.stage == 3:
        # A parameter that stays whole between steps would miss the EMA, which is written into its partition.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        settings["zero_optimization"]["zero_hpz_partition_size"] = config.zero.hpz_partition_size
    # At stage 0 Bf16Compute rounds fp32 weights: DeepSpeed's own bf16 wrapper for stage 0 is another optimizer with
    # other arithmetic, which would not be comparable with the other stages.
    if config.train.precision == "bf16" and config.zero.stage:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return settings


def _optimizer(model: nn.Module, train: TrainConfig, stage: int) -> torch.optim.AdamW:
    """Return the configured optimizer of the trainable parameters, built in or a plugin's; at stage 3 AdamW only.

    PyTorch's fused AdamW runs on the CPU and the GPU without a compiler; DeepSpeed's LAMB needs one, and a GPU.
    """
    # lr and weight decay are set before each step; until then no update happens.
    groups = parameter_groups(model)
    if stage == 3:
        if train.optimizer != "adamw":
            raise UserError(f"train.optimizer {train.optimizer} needs zero.stage 0, 1 or 2; it is {stage}")
        return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, fused=True)
    muon = partial(FiniteMuon, working=torch.bfloat16 if train.precision == "bf16" else torch.float32)
    own = OPTIMIZERS.own(train.optimizer)
    kinds: dict[str, Callable[..., FiniteAdamW]] = {"adamw": FiniteAdamW, "lamb": FiniteLamb, "muon": muon}
    kind = kinds[train.optimizer] if own is None else own.kind
    try:
        return kind(groups, clip=train.clip, lr=0.0, betas=train.betas, fused=True)
    except TypeError as error:
        if own is None:
            raise
        raise UserError(
            f"train.optimizer {train.optimizer}: {kind.__name__}({error}): let its __init__ take params and **options, "
            "and pass both to FiniteAdamW's"
        ) from error


def initialize(model: nn.Module, config: Config, micro_batch: int, accumulation: int) -> ZeroEngine:
    """Initialise DeepSpeed with ``model`` (fp32, on the rank's device) and collect this rank's shards, moments at zero.

    Under bf16 DeepSpeed makes its fp32 master weights from rounded ones; they are reset to ``model``'s own here. Frozen
    weights stay in the working type alone.
    """
    import deepspeed

    from iwm_fast.engine.fused_step import fused_zero

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile an unused shared-memory collective at the first launch (half a minute, and a compiler).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage = config.zero.stage
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    full = {name: p.detach().to(torch.float32, copy=True).flatten() for name, p in trainable.items()}
    shapes = {name: tuple(p.shape) for name, p in trainable.items()}
    optimizer = _optimizer(model, config.train, stage)
    rounding = stage == 0 and config.train.precision == "bf16"
    network: nn.Module = Bf16Compute(model) if rounding else model
    host_copies.join_group(config.zero.hpz_partition_size)
    with fused_zero() if stage in (1, 2) else contextlib.nullcontext():
        engine, _, _, _ = deepspeed.initialize(
            model=GraphedStep(network, CudaRecorder()) if config.train.cuda_graph else network,
            optimizer=optimizer,
            config=deepspeed_config(config, micro_batch, accumulation),
            dist_init_required=False,
        )
    if stage in (1, 2):
        engine.optimizer.due = engine.is_gradient_accumulation_boundary
        engine.optimizer.at_the_end = config.train.cuda_graph
    elif stage == 0:
        sums = _sum_gradients(engine, optimizer, list(trainable.values()))
        if sums and isinstance(network, Bf16Compute) and not config.train.cuda_graph:
            network.hand_over(sums.buckets, sums.made)
    zero = ZeroEngine(engine, optimizer, stage, model, [], shapes)
    zero.set_updates(0)
    zero.shards = _shards(zero, shapes)
    if rounding and isinstance(model, IWM):
        for constant in model.constants.values():  # rounded once, not in each step; checkpoints read their file
            constant.data = constant.data.bfloat16()
    for shard in zero.shards:
        shard.weight.copy_(full[shard.name][shard.start : shard.stop])
        for moment in shard.moments.values():
            moment.zero_()
    return zero


def _sum_gradients(
    engine: Any, optimizer: torch.optim.Optimizer, trainable: list[nn.Parameter]
) -> SummedGradients | None:
    """Stage 0: reduce gradients during a step's last backward pass, instead of DeepSpeed after it."""
    if engine.dp_world_size == 1:
        engine.enable_backward_allreduce = False  # it would flatten every gradient, and copy it back
        return None
    assert isinstance(optimizer, FiniteAdamW)
    optimizer.copies = engine.dp_world_size
    sums = SummedGradients(
        trainable, engine.seq_data_parallel_group, engine.is_gradient_accumulation_boundary, BUCKET_BYTES
    )
    engine.buffered_allreduce_fallback = lambda **_options: sums.wait()
    return sums


def _shards(zero: ZeroEngine, shapes: dict[str, tuple[int, ...]]) -> list[Shard]:
    named = {name: p for name, p in zero.module.named_parameters() if p.requires_grad}
    collect = {0: _whole, 1: _fragment, 2: _fragment, 3: _partition}[zero.stage]
    found = (collect(zero, name, parameter, shapes[name]) for name, parameter in named.items())
    return [shard for shard in found if shard is not None]


def _whole(zero: ZeroEngine, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> Shard:
    """Stage 0: every rank holds everything."""
    state = zero.optimizer.state[parameter]
    return Shard(name, shape, 0, parameter.data.view(-1), {key: state[key].view(-1) for key in MOMENTS})


def _fragment(zero: ZeroEngine, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> Shard | None:
    """Stages 1 and 2: the part of a parameter in this rank's slice of the flattened group, if any."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # noqa: SLF001  (DeepSpeed has no public name)
    if mapping is None:
        return None
    where = mapping.get_hp_fragment_address()
    flat = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
    state = zero.optimizer.state[flat]
    moments = {key: state[key].narrow(0, where.start, where.numel) for key in MOMENTS}
    return Shard(name, shape, mapping.lp_fragment_address.start, mapping.get_hp_fragment().data, moments)


def _partition(zero: ZeroEngine, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> Shard | None:
    """Stage 3: an equal share of each parameter per rank; the last ones are padded, and may be all padding."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    weight = safe_get_local_fp32_param(parameter)
    start = weight.numel() * zero.engine.global_rank
    length = min(weight.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
    if length <= 0:
        return None
    moments = {key: safe_get_local_optimizer_state(parameter, key)[:length] for key in MOMENTS}
    return Shard(name, shape, start, weight[:length].data, moments)
