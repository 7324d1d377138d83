"""Arithmetic of batches and steps: micro-batch, accumulation, length of the schedules, warm-up."""

from __future__ import annotations

from iwm_fast.config import Config
from iwm_fast.errors import UserError

__all__ = ["divide_batch", "in_steps", "known_in_steps", "said_in_steps", "training_steps", "warmup_steps"]


def divide_batch(global_batch: int, world: int, ceiling: int | None) -> tuple[int, int]:
    """Return (micro-batch, accumulation); the micro-batch is the largest divisor of a rank's share up to `ceiling`.

    Raises UserError where `world` does not divide the global batch.
    """
    left = global_batch % world
    if left:
        below, above = global_batch - left, global_batch - left + world
        nearest = f"{below} or {above}" if below else f"{above} is one image per rank"
        raise UserError(
            f"train.global_batch is {global_batch}, which does not divide evenly over {world} ranks; "
            f"make it a multiple of {world} ({nearest}), or change the number of ranks"
        )
    share = global_batch // world
    micro = next(size for size in range(min(share, ceiling or share), 0, -1) if share % size == 0)
    return micro, share // micro


def training_steps(config: Config, images: int) -> int:
    """Return the length of the schedules in steps: ``train.schedule_steps``, or ``train.epochs`` over ``images``."""
    if config.train.schedule_steps is not None:
        return config.train.schedule_steps
    return max(1, round(config.train.epochs * images / config.train.global_batch))


def warmup_steps(config: Config, images: int) -> int:
    """Return the steps of warm-up: ``train.warmup``, or ``train.warmup_epochs`` or ``train.warmup_ratio`` in steps."""
    train = config.train
    if train.warmup_epochs is not None:
        return round(train.warmup_epochs * images / train.global_batch)
    if train.warmup_ratio is not None:
        return round(train.warmup_ratio * training_steps(config, images))
    return train.warmup


def in_steps(config: Config, images: int) -> Config:
    """Return the configuration with epochs of ``images`` images and ratios replaced by steps.

    ``train.epochs`` stays, because `training_steps` reads it.
    """
    changed = {"train": {"warmup": warmup_steps(config, images), "warmup_epochs": None, "warmup_ratio": None}}
    for name in ("checkpoint", "eval"):
        epochs = getattr(config, name).every_epochs
        if epochs is not None:
            steps = max(1, round(epochs * images / config.train.global_batch))
            changed[name] = {"every_steps": steps, "every_epochs": None}
    sections = {name: getattr(config, name).model_copy(update=keys) for name, keys in changed.items()}
    return config.model_copy(update=sections)


def said_in_steps(config: Config, images: int) -> list[str]:
    """Return a line per key that is set in epochs or as a ratio, with its number of steps."""
    now, total = in_steps(config, images), training_steps(config, images)
    said = []
    for key in ("warmup_epochs", "warmup_ratio"):
        value = getattr(config.train, key)
        if value is not None:
            said.append(f"train.{key} {value:g} is {now.train.warmup:,} of {total:,} steps")
    for name, before, after in (
        ("checkpoint", config.checkpoint, now.checkpoint),
        ("eval", config.eval, now.eval),
    ):
        if before.every_epochs is not None:
            steps = "step" if after.every_steps == 1 else f"{after.every_steps:,} steps"
            said.append(f"{name}.every_epochs {before.every_epochs:g} is every {steps}")
    return said


def known_in_steps(config: Config) -> list[str]:
    """Return the lines of `said_in_steps` where the number of images is unknown.

    A ratio of ``train.schedule_steps`` is known all the same; for epochs the line says where to find the steps.
    """
    by_ratio = config.train.warmup_ratio is not None and config.train.schedule_steps is not None
    said = said_in_steps(config, 0)
    keys = [line.rpartition(" is ")[0] for line in said]
    known = said[:1] if by_ratio else []
    return known + [
        f"{key}: depends on the number of images; iwm-fast plan CONFIG prints the steps" for key in keys[len(known) :]
    ]
