"""Weights that a run never changes, those of a frozen target or a frozen encoder: one file for all its checkpoints.

``frozen.safetensors`` lies beside the checkpoints' folders, written by the first rank when the run begins. Each
checkpoint's index names its size and SHA-256, so that a checkpoint with other frozen weights is a damaged one. Nothing
reads the file that the weights came from after that.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iwm_fast.atomic_files import sync
from iwm_fast.engine.checkpoint.shard_file import file_sum, write_tensors
from iwm_fast.errors import UserError, because
from iwm_fast.file_names import utf8_name

__all__ = ["FROZEN_FILE", "FROZEN_KEY", "FrozenFile", "adopt_frozen", "frozen_fault", "frozen_of", "write_frozen"]

FROZEN_FILE = "frozen.safetensors"
FROZEN_KEY = "frozen"  # of a checkpoint's index


@dataclass(frozen=True)
class FrozenFile:
    """The file, and its {bytes, sha256}, for the checkpoints' indices."""

    path: Path
    sums: Mapping[str, Any]

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy the weights, fp32, into parameters of these names. Raises UserError where one is missing, or of another
        shape.
        """
        try:
            with utf8_name(self.path) as name, safe_open(name, framework="pt") as file:
                keys = set(file.keys())
                for key, parameter in parameters.items():
                    found = list(file.get_slice(key).get_shape()) if key in keys else None
                    if found != list(parameter.shape):
                        raise UserError(
                            f"{self.path}: frozen weights of another architecture: {key} is {found or 'absent'} there "
                            f"and {list(parameter.shape)} in this configuration; use the run's own config.yaml"
                        )
                    parameter.copy_(file.get_tensor(key))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); restore it, every checkpoint needs it") from error


def write_frozen(checkpoints: Path, parameters: Mapping[str, Tensor]) -> FrozenFile:
    """Write a new run's frozen weights, fp32, whole or not at all; call it while the run is locked. Raises UserError
    where the disk is full.
    """
    path = checkpoints / FROZEN_FILE
    partial = path.with_name(f".{FROZEN_FILE}.partial")
    try:
        try:
            sums = write_tensors(partial, {name: tensor.detach().float() for name, tensor in parameters.items()})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # frees a full disk
        sync(checkpoints)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({because(error)})") from error
    return FrozenFile(path, sums)


def adopt_frozen(checkpoint: Path, checkpoints: Path, sums: Mapping[str, Any]) -> FrozenFile:
    """Return the frozen weights of the checkpoint that a run resumes from; copy them where that is another run's."""
    source, path = _beside(checkpoint), checkpoints / FROZEN_FILE
    try:
        if not (path.exists() and path.samefile(source)):
            partial = path.with_name(f".{FROZEN_FILE}.partial")
            try:
                shutil.copyfile(source, partial)
                sync(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            sync(checkpoints)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({because(error)})") from error
    return FrozenFile(path, sums)


def frozen_of(checkpoint: Path, index: Mapping[str, Any]) -> FrozenFile | None:
    """Return the frozen weights that a checkpoint's index names, None where it names none."""
    sums = index.get(FROZEN_KEY)
    return None if sums is None else FrozenFile(_beside(checkpoint), sums)


def frozen_fault(checkpoint: Path, index: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the frozen weights that a checkpoint's index names, or None. Raises OSError where they
    cannot be read.
    """
    named = frozen_of(checkpoint, index)
    if named is None:
        return None
    if not named.path.exists():
        return f"{named.path}: its frozen weights are missing; restore that file"
    if file_sum(named.path) != dict(named.sums):
        return f"{named.path}: its frozen weights are not those that were written (SHA-256 differs); restore that file"
    return None


def _beside(checkpoint: Path) -> Path:
    """The file beside a checkpoint's folder, as its path is written, else along its links."""
    written = checkpoint.parent / FROZEN_FILE
    return written if written.exists() else checkpoint.resolve().parent / FROZEN_FILE
