"""`iwm-fast pretrain`: start a training, or resume one."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Annotated

import typer

from iwm_fast.cli.completion import config_or_overrides
from iwm_fast.cli.options import CONFIG_HELP, Overrides
from iwm_fast.errors import UserError

__all__ = ["pretrain"]


def pretrain(
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="The run's folder.")],
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help=f"{CONFIG_HELP} Optional on resume: default RUN/config.yaml.",
            autocompletion=config_or_overrides,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|never|PATH",
            help="Resume from the newest checkpoint, from none, or from PATH: a run, its checkpoints/latest, or one "
            "step_NNNNNN.",
        ),
    ] = "never",
) -> None:
    """Train a world model on one device, or on several ranks under torchrun, deepspeed or SLURM.

    SIGTERM, SIGUSR1 and Ctrl-C write a checkpoint and end the training: exit code 0, after Ctrl-C 130.
    """
    from iwm_fast.config.load import load_config

    file, changes = _configuration(config, overrides or [], out, resume)
    loaded = load_config(file, changes)
    from iwm_fast.engine import pretrain as train
    from iwm_fast.engine.distributed.ranks import leave
    from iwm_fast.eval.online import OnlineEvaluator

    ending = train(loaded, out, resume, evaluator=OnlineEvaluator())
    atexit.register(leave)
    if ending.first and ending.finished:
        for line in ending.lines():
            print(line)


def _configuration(config: str | None, overrides: list[str], out: Path, resume: str) -> tuple[Path, list[str]]:
    """Return the configuration's file and the overrides. Without CONFIG a resumed run has its own."""
    from iwm_fast.config.load import find_config

    if config is not None and ("=" not in config or Path(config).exists()):
        return find_config(config), overrides
    if config is not None:
        overrides = [config, *overrides]
    if resume == "never":
        raise UserError(
            "CONFIG is missing: name a YAML file or a packaged configuration; --resume auto takes RUN/config.yaml"
        )
    files = [out / "config.yaml"]
    if resume != "auto":
        from iwm_fast.engine.checkpoint.paths import named

        files.append(named(Path(resume)).run / "config.yaml")
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(f"{files[-1]}: no such file to resume with; name a CONFIG")
    return found, overrides
