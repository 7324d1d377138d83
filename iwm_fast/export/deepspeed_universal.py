"""A checkpoint in DeepSpeed's universal layout, for those who go on with DeepSpeed's own loader.

    OUT/latest_universal                         the tag, global_stepN
    OUT/global_stepN/mp_rank_00_model_states.pt  the weights by name, target's average included, and the counts of steps
    OUT/global_stepN/zero_pp_rank_0_…            the same, under the name that stage 3 looks for
    OUT/global_stepN/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt     of each trainable parameter
    OUT/global_stepN/zero/optimizer_state.pt     the optimizer's groups

DeepSpeed reads it with ``"checkpoint": {"load_universal": true}`` at stages 1 to 3 (its stage 0 has no universal
loader), and restores trainable parameters only: the target's average is in the first file, under ``module``. These are
pickles, as DeepSpeed wants them; this program writes and never reads them.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from iwm_fast.atomic_files import whole_folder
from iwm_fast.config import Config
from iwm_fast.engine.checkpoint.format import Checkpoint
from iwm_fast.engine.checkpoint.load import find_checkpoint, load_model
from iwm_fast.engine.optimizer import MOMENTS, parameter_groups
from iwm_fast.models.iwm import IWM
from iwm_fast.outputs import require_new_folder, writing

__all__ = ["export_universal"]

_MODEL_FILE = "mp_rank_00_model_states.pt"


def export_universal(run: Path, out: Path, which: str = "latest") -> Path:
    """Write a run's checkpoint in DeepSpeed's universal layout; the folder appears whole or not at all. Raises
    UserError.
    """
    require_new_folder(out)
    path = find_checkpoint(run, which)
    model, config, _, _ = load_model(run, path.name)
    with writing(out), whole_folder(out) as partial:
        try:
            _write(partial, model, config, Checkpoint(path))
        except RuntimeError as error:  # torch.save's error on a full disk
            raise OSError(" ".join(str(error).split())) from error
    return out


def _write(partial: Path, model: IWM, config: Config, saved: Checkpoint) -> None:
    step = saved.step
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tag = partial / f"global_step{step}"
    for name in trainable:
        folder = tag / "zero" / name
        folder.mkdir(parents=True)
        for kind, file in {"weight": "fp32", **{moment: moment for moment in MOMENTS}}.items():
            torch.save({"param": saved.full(kind, name)}, folder / f"{file}.pt")
        torch.save(torch.tensor(float(saved.updates)), folder / "step.pt")
    common: dict[str, Any] = {"lr": 0.0, "betas": config.train.betas, "eps": 1e-8}
    groups = [common | group | {"params": [i]} for i, group in enumerate(parameter_groups(model))]
    torch.save(_optimizer_state(groups, saved.updates), tag / "zero" / "optimizer_state.pt")
    written_by = saved.index.get("written_by", {})
    counts = {
        "module": model.state_dict(),
        "param_shapes": [{name: p.shape for name, p in trainable.items()}],
        "buffer_names": [name for name, _ in model.named_buffers()],
        "optimizer": None,
        "lr_scheduler": None,
        "dp_world_size": written_by.get("world", 1),
        "mp_world_size": 1,
        "global_steps": step,
        "global_samples": step * config.train.global_batch,
        "skipped_steps": step - saved.updates,
        "ds_version": _deepspeed_version(),
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    torch.save(counts, tag / _MODEL_FILE)
    shutil.copyfile(tag / _MODEL_FILE, tag / f"zero_pp_rank_0_{_MODEL_FILE}")
    (partial / "latest_universal").write_text(tag.name)


def _optimizer_state(groups: list[dict[str, Any]], updates: int) -> dict[str, Any]:
    state = {i: {"step": torch.tensor(float(updates))} for i in range(len(groups))}
    return {
        "optimizer_state_dict": {"state": state, "param_groups": groups},  # stage 3 looks here
        "param_groups": groups,  # stages 1 and 2 here
        "ds_version": _deepspeed_version(),
    }


def _deepspeed_version() -> str:
    return version("deepspeed")
