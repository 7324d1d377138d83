"""Settings that contradict each other, some of them only for the number of images at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

from iwm_fast.config import Config
from iwm_fast.config.batch import in_steps, training_steps, warmup_steps
from iwm_fast.errors import UserError

__all__ = ["conflicts", "length_conflicts", "require_a_step"]

# A run that stops after this share of its schedules has nearly all of them, and is not warned about.
_NEARLY_WHOLE = 0.9


def require_a_step(config: Config, images: int) -> None:
    """Raise UserError where ``train.epochs`` comes to less than half a step and no number of steps is set."""
    train = config.train
    steps = train.epochs * images / train.global_batch
    if train.schedule_steps is None and train.steps is None and steps < 0.5:
        raise UserError(
            f"train.epochs is {train.epochs:g} and train.global_batch {train.global_batch}: {images} images are "
            f"{steps:.2g} steps; lower train.global_batch, raise train.epochs, or set train.schedule_steps"
        )


def conflicts(config: Config, images: int) -> list[str]:
    """Return one warning per group of settings that contradict each other; empty where all agree."""
    return [*_rate(config), *_batch(config, images), *length_conflicts(config, images)]


def length_conflicts(config: Config, images: int) -> list[str]:
    """Return those warnings that concern the length of training."""
    return [*_warmup(config, images), *_length(config, images), *_never(config, images)]


def _rate(config: Config) -> Iterator[str]:
    train = config.train
    if train.optimizer == "muon" and train.lr == type(train).model_fields["lr"].default:
        yield (
            f"train.optimizer is muon and train.lr {train.lr:g}, the default, which suits adamw: muon learned most at "
            "0.008 with a small encoder; try train.lr from 0.004 to 0.016"
        )


def _batch(config: Config, images: int) -> Iterator[str]:
    batch = config.train.global_batch
    if batch > images:
        yield (
            f"train.global_batch is {batch:,} and there are {images:,} images: a step repeats images; "
            f"lower it to {images:,} or fewer"
        )


def _warmup(config: Config, images: int) -> Iterator[str]:
    warmup, total = warmup_steps(config, images), training_steps(config, images)
    if 2 * warmup <= total:
        return
    what = (
        "the learning rate does not reach its peak"
        if warmup >= total
        else "the learning rate rises for more than half of the training"
    )
    key, instead = "warmup", f"train.warmup to about {total // 10:,}"
    if config.train.warmup_epochs is not None:
        key = f"warmup_epochs {config.train.warmup_epochs:g}"
        instead = f"train.warmup_epochs to about {total / 10 * config.train.global_batch / images:.2g}"
    elif config.train.warmup_ratio is not None:
        key, instead = f"warmup_ratio {config.train.warmup_ratio:g}", "train.warmup_ratio to about 0.1"
    yield (
        f"train.{key} is {warmup:,} steps and the training {total:,}: {what}; "
        f"set {instead}, or train longer (train.epochs)"
    )


def _length(config: Config, images: int) -> Iterator[str]:
    train, total = config.train, training_steps(config, images)
    if train.steps is None or _NEARLY_WHOLE * total <= train.steps <= total:
        return
    if train.steps > total:
        ema = f" and train.ema at {train.ema[1]:g}" if config.model.target == "ema" else ""
        yield (
            f"train.steps is {train.steps:,} and the schedules end at step {total:,}: after it the learning rate "
            f"stays at {train.lr_final:g} of its peak{ema}; "
            f"set train.schedule_steps={train.steps}, or train.steps={total}"
        )
        return
    warmup = warmup_steps(config, images)
    warming = f", within the warm-up of {warmup:,}" if train.steps < warmup < total else ""
    yield (
        f"train.steps stops training at step {train.steps:,} of the schedules' {total:,}{warming}; "
        f"for schedules of that length set train.schedule_steps={train.steps}"
    )


def _never(config: Config, images: int) -> Iterator[str]:
    """Warn of checkpoints and evaluations that are due after the last step."""
    stop = config.train.steps or training_steps(config, images)
    never: list[str] = []
    counted = in_steps(config, images)
    every, keep = counted.checkpoint.every_steps, config.checkpoint.keep_every
    measured = counted.eval.every_steps
    if measured is not None and measured > stop:
        never.append(f"no evaluation ({_interval('eval', config.eval.every_epochs, measured)})")
    if every > stop:
        said = _interval("checkpoint", config.checkpoint.every_epochs, every)
        never.append(f"one checkpoint only, at its end ({said})")
    elif keep is not None and math.lcm(every, keep) > stop:
        never.append(
            f"no checkpoint that is never removed (checkpoint.keep_every {keep:,} and every_steps {every:,} first "
            f"coincide at step {math.lcm(every, keep):,})"
        )
    if never:
        yield f"the training ends at step {stop:,}, so there is {' and '.join(never)}"


def _interval(section: str, epochs: float | None, steps: int) -> str:
    """An interval in the unit in which it was set."""
    if epochs is None:
        return f"{section}.every_steps {steps:,}"
    return f"{section}.every_epochs {epochs:g}: {steps:,} steps"
