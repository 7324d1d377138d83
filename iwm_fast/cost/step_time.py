"""Seconds of one optimizer step by part, from FLOPs, bytes and rates."""

from __future__ import annotations

from dataclasses import dataclass

from iwm_fast.actions.external import action_dim
from iwm_fast.config import Config
from iwm_fast.cost.communication import Collective, Fabric, Transfer
from iwm_fast.cost.devices import Device
from iwm_fast.cost.flops import StepFlops, step_flops
from iwm_fast.cost.memory import Layout
from iwm_fast.cost.muon import fullest_rank, matrices_of
from iwm_fast.cost.tokens import Tokens

__all__ = ["StepTime", "image_flops", "step_time"]

MEMORY_EFFICIENCY = 0.75  # assumed: the share of the data sheet's memory bandwidth that the optimizer reaches
# Assumed: the host takes 10 µs per operator of eager PyTorch, of which a block's forward pass has about eight.
LAUNCH_S = 80e-6


@dataclass(frozen=True)
class StepTime:
    """Seconds. compute: forward and backward, with recomputation. optimizer: the update and the EMA.

    communication: of all collectives; exposed: the part that overlaps with no computation. data: to make the images,
    None without a rate; it overlaps with the rest, so the slower of the two counts. launches: the host's time to launch
    the kernels of all micro-batches, forward and backward; neither pass takes less than its own.
    """

    forward: float
    backward: float
    optimizer: float
    communication: float
    exposed: float
    link: float
    network: float
    data: float | None
    launches: float = 0.0

    @property
    def total(self) -> float:
        """The step."""
        return max(self.forward + self.backward + self.optimizer + self.exposed, self.data or 0.0)


def image_flops(config: Config, tokens: Tokens) -> StepFlops:
    """Return the FLOPs of the sampled images together; divide by their number for those per image."""
    actions = action_dim(config.actions)
    return step_flops(config.model, actions, tokens.context, tokens.predicted, tokens.sources, tokens.steps)


def step_time(
    config: Config,
    layout: Layout,
    tokens: Tokens,
    collectives: list[Collective],
    fabric: Fabric,
    device: Device,
    mfu: float,
    data_rate: float | None,
    accumulation: int = 1,
    more: float = 1.0,
) -> StepTime:
    """Return the time of a step of the configuration's global batch, divided evenly over the fabric's ranks.

    Args:
        config: its precision, stage and activation checkpointing.
        layout: of its parameters.
        tokens: of the images whose mean represents all.
        collectives: of the step.
        fabric: the ranks and their links.
        device: its rates.
        mfu: FLOP/s over the data sheet's, of train.precision.
        data_rate: images/s of the input pipeline for one rank, or None.
        accumulation: micro-batches per rank.
        more: context and predicted tokens with padding, over those without. The target has none.

    """
    images = config.train.global_batch / fabric.world
    muon = config.train.optimizer == "muon"
    update_flops = fullest_rank(matrices_of(layout), fabric.world)[0] if muon else 0
    flops, drawn = image_flops(config, tokens), tokens.images
    rate = device.rate(config.train.precision) * mfu * drawn / images
    encoded = 0 if config.model.freeze_encoder else flops.context_forward
    again = encoded + flops.predictor_forward if config.train.activation_checkpointing else 0
    launched = _launches(config, accumulation)
    source = flops.context_forward + flops.predictor_forward
    computed = (
        (flops.target_forward + more * source) / rate,
        more * (flops.context_backward + flops.predictor_backward + again) / rate,
    )
    waits = (0.0, 0.0)
    if config.zero.hpz_partition_size > 1:
        waits = _host_waits(config, flops.target_forward / rate, computed[1], launched, accumulation)
    forward, backward = (max(c, n) + w for c, n, w in zip(computed, launched, waits, strict=True))
    transfers = [fabric.transfer(c) for c in collectives]
    # A graph hands over all gradients at its end.
    hidden = {"forward": forward, "backward": 0.0 if config.train.cuda_graph else backward, None: 0.0}
    exposed = sum(_exposed(collectives, transfers, part, time) for part, time in hidden.items())
    return StepTime(
        forward,
        backward,
        _optimizer_bytes(config, layout, fabric.world) / (device.bandwidth * MEMORY_EFFICIENCY)
        + update_flops / (device.rate(config.train.precision) * mfu),
        sum(t.seconds for t in transfers),
        exposed,
        sum(t.link_s for t in transfers),
        sum(t.network_s for t in transfers),
        images / data_rate if data_rate else None,
        sum(launched),
    )


def _exposed(collectives: list[Collective], transfers: list[Transfer], part: str | None, time: float) -> float:
    """Seconds of the collectives that overlap with this part of the step, of `time` seconds, that it does not hide."""
    own = [(c, t.seconds) for c, t in zip(collectives, transfers, strict=True) if c.hidden_by == part]
    return max(
        sum(c.last * seconds for c, seconds in own),
        sum(seconds for _, seconds in own) - time,
        sum(max(0.0, seconds - c.share * time) for c, seconds in own),
    )


def _host_waits(
    config: Config, target: float, backward: float, launched: tuple[float, float], accumulation: int
) -> tuple[float, float]:
    """Seconds that a host's copy of the parameters adds to the forward and the backward pass of a step.

    When DeepSpeed makes the copy of a parameter, in a step's first micro-batch, the host waits for the device: there
    launches do not overlap with the computation, and the shorter of the two is added. A trained parameter is copied
    once, which is counted in the backward pass; one of the EMA in the target's forward pass; a frozen one never again.
    """
    blocks = config.model.target_architecture.shape.depth if config.model.target == "ema" else 0
    return min(blocks * LAUNCH_S, target / accumulation), min(launched[1], backward) / accumulation


def _launches(config: Config, accumulation: int) -> tuple[float, float]:
    """Seconds of the host to launch the forward and the backward passes: a block's backward pass has twice the
    operators, and those of its forward pass where that is recomputed. A CUDA graph is one launch.
    """
    if config.train.cuda_graph:
        return 0.0, 0.0
    encoder, predictor = config.model.encoder_shape.depth, config.model.predictor.depth * config.train.horizon
    again = 1 if config.train.activation_checkpointing else 0
    trained = predictor + (0 if config.model.freeze_encoder else encoder)
    forward, backward = encoder + config.model.target_architecture.shape.depth + predictor, trained * (2 + again)
    return accumulation * forward * LAUNCH_S, accumulation * backward * LAUNCH_S


def _optimizer_bytes(config: Config, layout: Layout, world: int) -> float:
    """Read gradient, weight and two moments, write all but the gradient; read EMA and weight, write the EMA and, from
    stage 1 on, its copy.
    """
    share = 1 if config.zero.stage == 0 else 1 / world
    copy = 0 if config.zero.stage == 0 else 2 if config.train.precision == "bf16" else 4
    return (4 * 7 * layout.trained_size + (4 * 3 + copy) * layout.target_size) * share
