"""A finetuned reader on disk: ``reader.safetensors`` with all its weights, ``finetune.json``, and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iwm_fast.atomic_files import whole_folder, write_whole_text
from iwm_fast.config import ModelConfig
from iwm_fast.engine.checkpoint.load import FINETUNED_FILE
from iwm_fast.engine.checkpoint.shard_file import file_sum, write_tensors
from iwm_fast.errors import UserError
from iwm_fast.eval.finetune.modes import MODES, Mode, reader_builder
from iwm_fast.file_names import utf8_name
from iwm_fast.models.iwm import IWM
from iwm_fast.models.task_model import HeadShape, Reader
from iwm_fast.outputs import require_new_folder

__all__ = ["REPORT", "Finetuned", "load_finetuned", "require_absent", "save_finetuned"]

SCHEMA = "iwm-fast-finetuned/1"
_WEIGHTS, _RECORD = "reader.safetensors", FINETUNED_FILE
REPORT = "report/index.html"


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A reader with the class names of each task (numbers if each pixel has a class).

    dense: by task, whether each pixel has a class. results: metrics, as the command returned them.
    """

    reader: Reader
    mode: Mode
    classes: dict[str, tuple[str, ...]]
    dense: dict[str, bool]
    results: dict[str, Any]

    def __call__(self, images: Tensor, task: str | None = None) -> Tensor:
        """Return logits of uint8 images (B, S, S, 3), as `Reader.forward`; ``task``: default the first."""
        with torch.inference_mode():
            logits: Tensor = self.reader(images, task if task is not None else next(iter(self.classes)))
        return logits


def require_absent(out: Path) -> None:
    """Raise UserError if ``out`` exists, or cannot be written: before any work, not after it."""
    require_new_folder(out)


def save_finetuned(
    out: Path,
    reader: Reader,
    *,
    model: ModelConfig,
    mode: Mode,
    shapes: Mapping[str, HeadShape],
    classes: Mapping[str, tuple[str, ...]],
    results: Mapping[str, Any],
    environment: Mapping[str, Any],
    page: str | None = None,
) -> None:
    """Write folder ``out`` atomically; ``environment``: recorded in it; ``page``: its report.

    Raise UserError if it exists or cannot be written.
    """
    require_absent(out)
    record = {
        "schema": SCHEMA,
        "environment": dict(environment),
        "mode": mode,
        "action_dim": reader.action_dim,
        "model": model.described(),
        "tasks": {name: {**asdict(shape), "names": list(classes[name])} for name, shape in shapes.items()},
        "results": dict(results),
    }
    own = {name: tensor for name, tensor in reader.state_dict().items() if not name.startswith("trained_encoder.")}
    state = own | {f"encoder.{name}": tensor for name, tensor in reader.encoder.state_dict().items()}
    try:
        with whole_folder(out) as partial:
            record["weights"] = write_tensors(partial / _WEIGHTS, state)
            write_whole_text(partial / _RECORD, json.dumps(record, indent=1) + "\n")
            if page is not None:
                (partial / REPORT).parent.mkdir()
                write_whole_text(partial / REPORT, page)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}; give another --out") from error


def load_finetuned(out: Path) -> Finetuned:
    """Load what `save_finetuned` wrote, on the CPU and in evaluation mode. Raise UserError if it is incomplete, or if
    its weights have changed.
    """
    record = _record(out)
    if record.get("mode") not in MODES:
        raise _damaged(out, ValueError(f"its mode is {record.get('mode')!r}"))
    try:
        tasks = record["tasks"]
        shapes = {name: HeadShape(task["classes"], task["dense"]) for name, task in tasks.items()}
        model = IWM(ModelConfig.model_validate(record["model"]), record["action_dim"])
        reader = reader_builder(model, record["mode"], "random", shapes, "context")()
        with utf8_name(out / _WEIGHTS) as name:
            state = load_file(name)
        encoder = {
            name.removeprefix("encoder."): state.pop(name) for name in list(state) if name.startswith("encoder.")
        }
        reader.encoder.load_state_dict(encoder)
        missing, unexpected = reader.load_state_dict(state, strict=False)
        written = record.get("weights")  # None in results of earlier versions
        if written is not None and file_sum(out / _WEIGHTS) != written:
            raise UserError(f"{out / _WEIGHTS}: changed since {_RECORD} was written; finetune again")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _damaged(out, error) from error
    missing = [name for name in missing if not name.startswith("trained_encoder.")]
    if missing or unexpected:
        raise UserError(f"{out / _WEIGHTS}: {(missing + unexpected)[0]} is missing or unknown; finetune again")
    classes = {name: tuple(task["names"]) for name, task in tasks.items()}
    dense = {name: shape.dense for name, shape in shapes.items()}
    return Finetuned(reader.eval(), record["mode"], classes, dense, record.get("results", {}))


def _record(out: Path) -> dict[str, Any]:
    """Read the JSON. Raise UserError if there is none, or if it is another version's."""
    path = out / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{out}: not a finetuned result (no {_RECORD}); give a folder of iwm-fast finetune") from error
    except (OSError, ValueError) as error:
        raise _damaged(out, error) from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise UserError(f"{path}: its schema is {found!r}, this version reads {SCHEMA!r}; finetune again")
    return dict(record)


def _damaged(out: Path, error: Exception) -> UserError:
    line = " ".join(str(error).split())
    return UserError(f"{out}: an incomplete folder of iwm-fast finetune ({line:.200}); finetune again")
