"""RUN/environment.json: everything needed to repeat a run, with an entry for every launch."""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iwm_fast.config import Config
from iwm_fast.config.batch import in_steps, training_steps
from iwm_fast.config.plugins import plugin_digests
from iwm_fast.engine.distributed.links import Interconnect
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.environment import environment
from iwm_fast.errors import UserError, because

__all__ = ["describe_run", "recorded_environment", "recorded_launch", "recorded_starts"]


def describe_run(
    file: Path, config: Config, ranks: Ranks, step: int, measured: Interconnect | None, images: int
) -> dict[str, Any]:
    """Return the document for ``file``: this launch, and the earlier ones in the file.

    step: steps done at launch. measured: the interconnect, None for a rank alone. images: of the data; ``steps``
    records what is configured in epochs or ratios.
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
        "plugins": plugin_digests(config.plugins),
        "zero_stage": config.zero.stage,
        "ranks": [asdict(info) for info in ranks.infos],
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
    """Return the environment of the last launch; of a missing or damaged file only that."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        return {"not known": f"{file}: {because(error)}"}
    except (ValueError, RecursionError):
        return {"not known": f"{file}: is damaged"}
    found = document.get("environment") if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {"not known": f"{file}: is of another kind"}


def recorded_launch(file: Path) -> dict[str, Any]:
    """Return the last launch in a run's environment.json, with the ``version`` that trained; {} if the file is missing,
    damaged or of an older version.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        launch = dict(document["starts"][-1])
        launch["version"] = document["environment"]["iwm_fast"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return launch


def recorded_starts(file: Path) -> list[tuple[str, int]]:
    """Return the date, ISO 8601 in UTC, and the step of each launch of a run; [] where they are not known."""
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
        return [(str(start["started"]), int(start["step"])) for start in starts]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _earlier(file: Path) -> list[dict[str, Any]]:
    """Earlier launches; a file of another kind, or none, has none.

    Raises UserError where it may not be read.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    except OSError as error:  # rewriting it would lose the earlier launches
        raise UserError(f"{file}: cannot be read ({because(error)})") from error
    starts = document.get("starts") if isinstance(document, dict) else None
    return starts if isinstance(starts, list) else []
