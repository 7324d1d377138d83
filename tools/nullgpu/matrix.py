"""Trainings of three steps through stages, precisions, targets and options, on the null GPU.

Images are decoded by DALI on the CPU (its GPU operators have a CUDA runtime of their own); the rest takes the CUDA
path. Losses are what was in memory: that a training ends with its metrics and its checkpoint is what is asked.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config
from iwm_fast.data.tools.synth import draw_dataset
from iwm_fast.engine import pretrain
from iwm_fast.engine import step as loop
from iwm_fast.engine.checkpoint.load import EXPORT_FILE, EXPORT_SCHEMA
from iwm_fast.engine.checkpoint.shard_file import write_tensors
from iwm_fast.log_filters import quiet_third_parties
from iwm_fast.models.iwm import IWM
from tools.nullgpu.place import FOLDER

__all__ = ["CASES", "main"]

_SMALL: dict[str, Any] = {
    "model": {
        "encoder": {"depth": 2, "width": 32, "heads": 2},
        "patch": 8,
        "image": 32,
        "predictor": {"depth": 2, "width": 32, "heads": 2, "conditioning": "feature"},
    },
    "masks": {"min_context": 2},
    "data": {"device": "cpu", "threads": 1},
    # Nothing is computed, so gradients are rubbish and every step may be skipped.
    "train": {"seed": 3, "global_batch": 8, "precision": "bf16", "steps": 3, "schedule_steps": 20, "max_skipped": 1000},
    "zero": {"stage": 0},
    "log": {"every_steps": 1, "tensorboard": False},
    "checkpoint": {"every_steps": 2},
}
_VIT = {"kind": "vit", "depth": 2, "width": 32, "heads": 2}
_TEACHER = FOLDER / "teacher"
_TAUGHT = {"model.target": "frozen", "model.target_init": str(_TEACHER)}
_FROZEN = {"model.target": "shared", "model.freeze_encoder": True, "model.init": str(_TEACHER)}
CASES: dict[str, dict[str, Any]] = {
    "fp32 stage 0": {"train.precision": "fp32"},
    "bf16 stage 0": {},
    "bf16 stage 1": {"zero.stage": 1},
    "bf16 stage 2": {"zero.stage": 2},
    "bf16 stage 3": {"zero.stage": 3},
    "fp32 stage 3": {"train.precision": "fp32", "zero.stage": 3},
    "target stream": {"zero.stage": 1, "train.target_stream": True},
    "clip stage 1": {"zero.stage": 1, "train.clip": 1.0},
    "clip stage 0": {"train.clip": 1.0},
    "lamb": {"train.optimizer": "lamb"},
    "muon": {"train.optimizer": "muon"},
    "accumulation": {"zero.stage": 2, "train.micro_batch": 4},
    "activation checkpointing": {"zero.stage": 1, "train.activation_checkpointing": True},
    "fp8 target": {"zero.stage": 1, "model.target_precision": "fp8"},
    "fp8 target in fp32": {"train.precision": "fp32", "model.target_precision": "fp8"},
    "two sources": {"views.sources_per_target": 2},
    "geometric": {"actions.groups": ["photometric", "geometric"]},
    "mlp predictor": {"model.predictor": {"kind": "mlp", "depth": 2, "width": 32, "conditioning": "block"}},
    "shared target": {"model.target": "shared", "zero.stage": 1},
    "frozen target": _TAUGHT | {"zero.stage": 1},
    "frozen target, stage 0": _TAUGHT,
    "frozen encoder": _FROZEN | {"zero.stage": 2},
    "frozen encoder, stage 3": _FROZEN | {"zero.stage": 3},
    "sequence": {"model.predictor": _VIT | {"conditioning": "sequence"}},
    "block and feature": {"model.predictor": _VIT | {"conditioning": "feature+block"}},
    "unconditioned": {"model.predictor": _VIT | {"conditioning": "none"}},
    "compiled, target stream": {"zero.stage": 1, "train.compile": True, "train.target_stream": True},
    "sdpa": {"model.attention": "sdpa"},
    "varlen": {"zero.stage": 1, "model.attention": "varlen"},
    "deterministic": {"zero.stage": 1, "train.deterministic": True},
    "deterministic varlen": {"zero.stage": 1, "model.attention": "varlen", "train.deterministic": True},
}
_RESUMED = "bf16 stage 2"


def _config(root: Path, changes: dict[str, Any]) -> Config:
    tree = json.loads(json.dumps(_SMALL))
    tree["data"]["root"] = str(root)
    for key, value in changes.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


def _write_teacher(folder: Path) -> Path:
    """Write an export of the small configuration's networks, untrained, computed on the CPU; return its folder."""
    config = _config(folder, {})
    space = space_of(config.actions)
    model = IWM(config.model, space.dim)
    folder.mkdir(exist_ok=True)
    for part in ("encoder", "target_encoder", "predictor"):
        write_tensors(folder / f"{part}.safetensors", model.get_submodule(part).state_dict())
    described = {"schema": EXPORT_SCHEMA, "step": 0, "model": config.model.model_dump(mode="json")}
    described["actions"] = config.actions.model_dump(mode="json") | {"names": list(space.names)}
    (folder / EXPORT_FILE).write_text(json.dumps(described))
    return folder


def _trained(changes: dict[str, Any], root: Path, out: Path, resume: str = "never") -> dict[str, Any]:
    """Train; the last record of metrics.jsonl."""
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(_config(root, changes), out / "run", resume)
    record: dict[str, Any] = json.loads((out / "run/metrics.jsonl").read_text().splitlines()[-1])
    return record


def _went(name: str, root: Path) -> str:
    """What a case did: empty where all is as asked, else what was wrong."""
    out = Path(tempfile.mkdtemp(dir=FOLDER))
    try:
        last = _trained(CASES[name], root, out)
        if last["step"] != 3 or not (out / "run/checkpoints/step_000003").is_dir():
            return f"ended at step {last['step']}"
        if name == _RESUMED and _trained(CASES[name] | {"train.steps": 5}, root, out, "auto")["step"] != 5:
            return "did not resume"
    except Exception as error:  # noqa: BLE001 - whatever a case raises is its row
        frames = traceback.extract_tb(error.__traceback__)[::-1]
        where = " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:6])
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} at {where}"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return ""


def main(names: Sequence[str]) -> int:
    """Run the named cases, or all; 1 where one failed."""
    quiet_third_parties()
    # What is never computed has no eigenvalues, and printing a tensor would read it.
    loop.rank_me = lambda _features: 1.0
    loop.energy_shares = lambda *_: {}
    torch._tensor_str._tensor_str = lambda _tensor, _indent: "..."  # noqa: SLF001 - there is no public switch
    images = FOLDER / "images"
    draw_dataset(images, train=128, test=16, size=64)
    _write_teacher(_TEACHER)
    failed = 0
    for name in names or CASES:
        begin = time.monotonic()
        wrong = _went(name, images / "train")
        failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'ok'} {name} ({time.monotonic() - begin:.0f} s) {wrong}", flush=True)
    print(f"{len(names or CASES) - failed} passed, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the libraries' own destructors wait for a device that is not there
