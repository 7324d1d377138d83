"""Load a model from a run or an export: fp32, whole, in evaluation mode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from iwm_fast.actions.external import space_of
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.config.load import config_from
from iwm_fast.engine.checkpoint.format import Checkpoint
from iwm_fast.engine.checkpoint.fragments import restore_module
from iwm_fast.engine.checkpoint.paths import chosen_checkpoint, whole_checkpoint
from iwm_fast.engine.run_directory import run_config
from iwm_fast.errors import UserError, because
from iwm_fast.file_names import utf8_name
from iwm_fast.models.iwm import IWM

__all__ = [
    "EXPORT_FILE",
    "EXPORT_SCHEMA",
    "FINETUNED_FILE",
    "GRAPHS_SCHEMA",
    "default_device",
    "export_config",
    "export_environment",
    "export_weights",
    "find_checkpoint",
    "is_export",
    "is_finetuned",
    "load_export",
    "load_model",
    "records_evaluation",
]

EXPORT_FILE = "config.json"
EXPORT_SCHEMA = "iwm-fast-export/1"
_EVALUATION = {"train", "data", "eval"}  # sections that an export may record of its run
GRAPHS_SCHEMA = "iwm-fast-graphs/1"  # of exported graphs, which are described alike but cannot be loaded
FINETUNED_FILE = "finetune.json"


def default_device() -> torch.device:
    """Return the default device of a loaded model: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_export(folder: Path) -> bool:
    """Return whether ``iwm-fast export`` wrote the folder."""
    return (folder / EXPORT_FILE).exists() and not (folder / "config.yaml").exists()


def is_finetuned(folder: Path) -> bool:
    """Return whether ``iwm-fast finetune`` wrote the folder."""
    return (folder / FINETUNED_FILE).exists() and not (folder / "config.yaml").exists()


def find_checkpoint(run: Path, which: str = "latest") -> Path:
    """Return the newest intact checkpoint of a run, or the one that RUN or ``which`` names (`paths`).

    Raises UserError where there is none.
    """
    found = chosen_checkpoint(run, which)
    if not (found.run / "config.yaml").exists():
        if (run / EXPORT_FILE).exists():
            raise UserError(f"{run}: an export, which iwm_fast.load reads; name the run that it was exported from")
        if (run / "iwm" / EXPORT_FILE).exists():
            raise UserError(f"{run}: an export in several formats, each in its folder; name {run / 'iwm'}")
        if is_finetuned(run):
            raise UserError(f"{run}: a finetuned result, which iwm_fast.load reads; name the run that it was made from")
        raise UserError(f"{run}: not a run (no config.yaml); name a folder that iwm-fast pretrain wrote")
    return whole_checkpoint(found)


def load_model(run: Path, which: str = "latest", overrides: Sequence[str] = ()) -> tuple[IWM, Config, ActionSpace, int]:
    """Return (model, configuration, action space, steps done) of a run's checkpoint, named as for `find_checkpoint`.

    ``overrides``: ``key.path=value`` for the run's configuration; UserError where the weights no longer fit.
    """
    path = find_checkpoint(run, which)
    config = run_config(chosen_checkpoint(run, which).run / "config.yaml", overrides)
    space = space_of(config.actions)
    model = IWM(config.model, space.dim)
    saved = Checkpoint(path)
    restore_module(model, saved)
    return model.eval(), config, space, saved.step


def load_export(folder: Path) -> tuple[IWM, Config, ActionSpace, int]:
    """Return (model, configuration as `export_config`, action space, steps done) of what ``iwm-fast export`` wrote.

    Raises UserError where a file is missing, truncated, of another version or of another network.
    """
    config, step = export_config(folder), _described(folder).get("step")
    if not isinstance(step, int):
        raise UserError(f"{folder / EXPORT_FILE}: not as exported (step is {step!r:.60}); export the run again")
    space = space_of(config.actions)
    model = IWM(config.model, space.dim)
    parts = {"encoder": model.encoder, "target_encoder": model.target_encoder, "predictor": model.predictor}
    for name, module in parts.items():
        if module is not None:
            _fill(module, folder / f"{name}.safetensors")
    return model.eval(), config, space, step


def export_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration that an export's weights are evaluated with, and ``overrides`` of it: the model, its
    actions, and what the run was evaluated with. Keys that an export does not record have their defaults.

    Raises UserError as `load_export`.
    """
    described = _described(folder)
    actions, recorded = described.get("actions"), described.get("evaluation", {})
    # A folder from elsewhere must not name plugins, which are code.
    if not isinstance(actions, dict) or not isinstance(recorded, dict) or not recorded.keys() <= _EVALUATION:
        raise UserError(f"{folder / EXPORT_FILE}: not as exported (actions or evaluation); export the run again")
    actions = {key: value for key, value in actions.items() if key != "names"}
    settings = {"model": described.get("model"), "actions": actions, **recorded}
    try:
        config = config_from(settings, "")
    except UserError as error:
        raise UserError(f"{folder / EXPORT_FILE}: not as exported ({error}); export the run again") from error
    return config_from(settings, str(folder / EXPORT_FILE), overrides) if overrides else config


def records_evaluation(folder: Path) -> bool:
    """Return whether an export records what its run is evaluated with; earlier versions did not."""
    return "evaluation" in _described(folder)


def export_weights(folder: Path) -> str:
    """Return the digest that names an export's weights in results: that of the checkpoint which it was made from."""
    described = _described(folder)
    found = described.get("weights")
    return found if isinstance(found, str) else hashlib.sha256((folder / EXPORT_FILE).read_bytes()).hexdigest()[:16]


def export_environment(folder: Path) -> Mapping[str, Any]:
    """Return the environment that an export was written in, {} where it records none."""
    found = _described(folder).get("environment")
    return found if isinstance(found, dict) else {}


def _described(folder: Path) -> Mapping[str, Any]:
    path = folder / EXPORT_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not an export (no {EXPORT_FILE}); name a folder of iwm-fast export") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({because(error)})") from error
    except ValueError as error:
        raise UserError(f"{path}: not as exported ({error}); export the run again") from error
    found = described.get("schema") if isinstance(described, dict) else None
    if found is None or found == GRAPHS_SCHEMA:
        raise UserError(f"{folder}: {_other_format(described)}; export the run with --format iwm, and name that folder")
    if found != EXPORT_SCHEMA:
        raise UserError(f"{path}: schema is {found!r}, this version reads {EXPORT_SCHEMA!r}; export the run again")
    return dict(described)


def _other_format(described: Any) -> str:
    """Return what a folder with another config.json is."""
    about = described if isinstance(described, dict) else {}
    own = about.get("iwm_fast", about)
    form = own.get("format") if isinstance(own, dict) else None
    return (
        f"an export in the format {form}" if form else "not an export that iwm-fast reads (config.json has no schema)"
    )


@torch.no_grad()
def _fill(module: nn.Module, path: Path) -> None:
    """Copy a file's tensors into a module; it must hold exactly the module's parameters."""
    try:
        with utf8_name(path) as name:
            found = load_file(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read whole ({error}); export the run again") from error
    own = module.state_dict()
    for name in sorted(own.keys() | found.keys()):
        if name not in own or name not in found or own[name].shape != found[name].shape:
            raise UserError(f"{path}: {name} is not that of {EXPORT_FILE} beside it; export the run again")
    module.load_state_dict(found)
