"""The arithmetic of a batch: how it is divided, and how many of them a training has."""

from __future__ import annotations

from iwm_fast.config import Config
from iwm_fast.errors import UserError

__all__ = ["divide_batch", "in_steps", "known_in_steps", "said_in_steps", "training_steps", "warmup_steps"]


def divide_batch(global_batch: int, world: int, ceiling: int | None) -> tuple[int, int]:
    """(micro-batch, accumulation): the largest divisor of a rank's share that is not above `ceiling`.

    UserError where `world` does not divide the global batch.
    """
    if global_batch % world:
        raise UserError(
            f"train.global_batch is {global_batch}, which {world} ranks cannot share evenly; "
            f"make it a multiple of {world}, or change the number of ranks"
        )
    share = global_batch // world
    micro = next(size for size in range(min(share, ceiling or share), 0, -1) if share % size == 0)
    return micro, share // micro


def training_steps(config: Config, images: int) -> int:
    """Length of the schedules in steps: ``train.schedule_steps``, or ``train.epochs`` passes over ``images``."""
    if config.train.schedule_steps is not None:
        return config.train.schedule_steps
    return max(1, round(config.train.epochs * images / config.train.global_batch))


def warmup_steps(config: Config, images: int) -> int:
    """Steps of warm-up: ``train.warmup``, or what ``train.warmup_epochs`` or ``train.warmup_ratio`` come to."""
    train = config.train
    if train.warmup_epochs is not None:
        return round(train.warmup_epochs * images / train.global_batch)
    if train.warmup_ratio is not None:
        return round(train.warmup_ratio * training_steps(config, images))
    return train.warmup


def in_steps(config: Config, images: int) -> Config:
    """The configuration with what is given in passes over ``images`` images, or as a share of the training, in steps.

    Its ``train.epochs`` stays: `training_steps` reads it.
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
    """A line for each key that is given in another unit than steps: how many steps it comes to."""
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
    """The same lines where the number of images is not known: that of a ratio of ``train.schedule_steps``, and for
    epochs where the steps are said.
    """
    by_ratio = config.train.warmup_ratio is not None and config.train.schedule_steps is not None
    keys = [line.rpartition(" is ")[0] for line in said_in_steps(config, 0)]
    known = said_in_steps(config, 0)[:1] if by_ratio else []
    return known + [
        f"{key}: counted in steps once the images are; iwm-fast plan CONFIG says how many" for key in keys[len(known) :]
    ]
