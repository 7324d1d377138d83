"""From a run's folder, or an export, to a model that answers: fp32, whole, in evaluation mode."""

from __future__ import annotations

from pathlib import Path

from iwm_fast.actions import ActionSpace
from iwm_fast.config import Config, load_config
from iwm_fast.engine import checkpoint
from iwm_fast.engine.checkpoint import Checkpoint
from iwm_fast.engine.state import restore_module
from iwm_fast.errors import UserError
from iwm_fast.models.iwm import IWM

__all__ = ["find_checkpoint", "load_model"]


def find_checkpoint(run: Path, which: str = "latest") -> Path:
    """The newest whole checkpoint of a run, or the one named ``step_NNNNNN``. Raises UserError when there is none."""
    root = run / "checkpoints"
    if not (run / "config.yaml").exists():
        raise UserError(f"{run}: not a run (no config.yaml); name a folder that iwm-fast pretrain wrote")
    if which != "latest":
        wrong = checkpoint.damage(root / which)
        if wrong:
            raise UserError(f"{root / which}: {wrong}; name another checkpoint")
        return root / which
    found, passed = checkpoint.newest(root)
    if found is None:
        raise UserError(f"{root}: no whole checkpoint" + (f" ({passed[0]})" if passed else "; train the run first"))
    return found


def load_model(run: Path, which: str = "latest") -> tuple[IWM, Config, ActionSpace, int]:
    """(model, configuration, action space, steps done) of a run's checkpoint."""
    path = find_checkpoint(run, which)
    config = load_config(run / "config.yaml", [])
    space = ActionSpace(config.actions.groups, config.actions.form)
    model = IWM(config.model, space.dim)
    saved = Checkpoint(path)
    restore_module(model, saved)
    return model.eval(), config, space, saved.step
