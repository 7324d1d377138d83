"""RUN/environment.json: all that another person needs to repeat a run, with a line for every start of it."""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iwm_fast.config import Config
from iwm_fast.config.batch import in_steps, training_steps
from iwm_fast.engine.distributed.links import Interconnect
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.environment import environment
from iwm_fast.errors import UserError, because

__all__ = ["describe_run", "recorded_environment"]


def describe_run(
    file: Path, config: Config, ranks: Ranks, step: int, measured: Interconnect | None, images: int
) -> dict[str, Any]:
    """The document to write to ``file``: what this start runs with, and the starts that the file already tells of.

    step: steps done when this start begins. measured: what the ranks' connections gave, None for a rank alone. images:
    of the data; what is configured in epochs or ratios is recorded in steps under ``steps``.
    """
    counted, total = in_steps(config, images), training_steps(config, images)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {
        "started": started,
        "command": sys.argv,
        "launcher": ranks.launcher,
        "world": ranks.world,
        "step": step,
        "images": images,
        "steps": {
            "train.schedule_steps": total,
            "train.steps": config.train.steps or total,
            "train.warmup": counted.train.warmup,
            "checkpoint.every_steps": counted.checkpoint.every_steps,
            "eval.every_steps": counted.eval.every_steps,
        },
        "zero_stage": config.zero.stage,
        "ranks": [asdict(peer) for peer in ranks.peers],
        "interconnect": measured.document() if measured else None,
    }
    return {
        "schema": "iwm-fast-environment/1",
        "environment": environment(),
        "seed": config.train.seed,
        "config": config.model_dump(mode="json"),
        "starts": [*_earlier(file), start],
    }


def recorded_environment(file: Path) -> dict[str, Any]:
    """What the last start ran with; where the file is missing or damaged, that alone."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        return {"not known": f"{file}: {because(error)}"}
    except (ValueError, RecursionError):
        return {"not known": f"{file}: is damaged"}
    found = document.get("environment") if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {"not known": f"{file}: is of another kind"}


def _earlier(file: Path) -> list[dict[str, Any]]:
    """Starts that are told of already; a file of another kind, or none, tells of none.

    UserError where it may not be read.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    except OSError as error:  # written anew, it would tell of none
        raise UserError(f"{file}: cannot be read ({because(error)})") from error
    starts = document.get("starts") if isinstance(document, dict) else None
    return starts if isinstance(starts, list) else []
