"""Features of every image of a data source, from the encoder of a run or of an export, in one file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.atomic_files import new_file
from iwm_fast.config import Config, ModelConfig, load_config
from iwm_fast.console import Count, part_of
from iwm_fast.data.image_list import ImageSet, list_images
from iwm_fast.data.sources import Patience
from iwm_fast.data.sources.base import folder_labels
from iwm_fast.data.sources.split_names import split_kind
from iwm_fast.data.split_layout import refuse_masks
from iwm_fast.engine.checkpoint.load import default_device, find_checkpoint, is_export, load_export, load_model
from iwm_fast.environment import environment
from iwm_fast.errors import UserError
from iwm_fast.eval.feature_cache import weights_digest
from iwm_fast.eval.feature_files import FeatureFile, Rows, Table, feature_file, require_suffix
from iwm_fast.eval.features import EncoderName, default_encoder, device_of, encoder_of, evaluating
from iwm_fast.eval.overrides import check_overrides, for_evaluation
from iwm_fast.eval.splits import FileSplit
from iwm_fast.eval.unusable import left_out_lines
from iwm_fast.models.iwm import IWM
from iwm_fast.models.vit import VisionTransformer
from iwm_fast.outputs import require_new_file, writing
from iwm_fast.results import json_text

__all__ = ["POOLS", "Pool", "embed_images", "embed_lines"]

SCHEMA = "iwm-fast-features/1"
Pool = Literal["mean", "none"]
POOLS: tuple[Pool, ...] = get_args(Pool)


def embed_images(
    run: Path,
    data: str | Path,
    out: Path,
    *,
    encoder: EncoderName | None = None,
    pool: Pool = "mean",
    checkpoint: str = "latest",
    overrides: Sequence[str] = (),
    progress: Count | None = None,
) -> dict[str, Any]:
    """Write the features of all images of ``data`` into the new file ``out`` (`feature_files`), in the data's order.

    ``run``: a run's folder or an export. ``data``: a folder, shards, TFRecord files, a manifest, s3:// too. Images are
    cropped to the centred largest square and resized, as evaluation reads them. ``encoder``: default the target
    encoder where it is an EMA. ``pool``: mean, the mean of all tokens (D,); none, all tokens (L, D), row-major.
    ``overrides``: ``key.path=value`` of the section data.

    Images that cannot be decoded are left out. Returns what the file's metadata say, without environment and
    configuration, with ``out`` and ``seconds``. UserError for whatever the user can fix, and for more images that
    cannot be decoded than ``data.max_bad_fraction`` allows; then there is no file.
    """
    if encoder not in (None, "target", "context"):
        raise UserError(f"--encoder {encoder}: no such encoder; give target or context")
    if pool not in POOLS:
        raise UserError(f"--pool {pool}: no such pooling; give one of {', '.join(POOLS)}")
    require_suffix(out)
    require_new_file(out)
    check_overrides(overrides, command="embed")
    opened = _open(run, checkpoint, overrides)
    images = _Labelled(list_images(data, opened.config.data.source, Patience.of(opened.config.data)), str(data))
    which = encoder or default_encoder(opened.model.config)
    network = encoder_of(opened.model.to(default_device()), which)
    shape = (network.width,) if pool == "mean" else (network.patches, network.width)
    table = Table(len(images.files), shape, images.classes, images.splits is not None)
    split = FileSplit(images.files, opened.model.config.image, opened.config.data, place=str(data))
    began = time.perf_counter()
    tell = part_of(progress, f"features of {data}")
    with new_file(out) as file, feature_file(out.suffix, file, table) as writer:
        count = _fill(writer, split, images, network, pool, tell, out)
        found = {
            "run": str(run.absolute()),
            "checkpoint": opened.checkpoint,
            "step": opened.step,
            "encoder": which,
            "weights_sha256": weights_digest(network),
            "pool": pool,
            "shape": list(shape),
            "image_size": opened.model.config.image,
            "data": str(data),
            "source": images.files.describe(),
            "images": count,
            "classes": list(images.classes),
            "left_out": split.left_out.record(),
        }
        with writing(out):
            record = {"schema": SCHEMA, **found, "configuration": opened.described, "environment": environment()}
            writer.finish(json_text(record, None))
    return {**found, "out": str(out), "seconds": time.perf_counter() - began}


def embed_lines(results: dict[str, Any]) -> list[str]:
    """Return the closing lines for the terminal."""
    shape = " x ".join(map(str, results["shape"]))
    rate = results["images"] / max(results["seconds"], 1e-9)
    first = (
        f"{results['out']}: {results['images']} features of {shape} numbers, {results['encoder']} encoder, "
        f"{results['image_size']} pixels, {rate:.0f} images/s"
    )
    return [first, *left_out_lines({"embed": results["left_out"]})]


@dataclass(frozen=True)
class _Opened:
    """config: its section data decides how images are read. described: the configuration that the file records."""

    model: IWM
    config: Config
    described: dict[str, Any]
    checkpoint: str | None
    step: int


def _open(run: Path, checkpoint: str, overrides: Sequence[str]) -> _Opened:
    if is_export(run):
        if checkpoint != "latest":
            raise UserError(f"{run}: an export has one checkpoint; leave out --checkpoint")
        model, own, _, step = load_export(run)
        config = load_config(Path("/dev/null"), overrides)  # an export does not record how images are read
        return _Opened(model, for_evaluation(config, overrides), _described(own.model, own.actions), None, step)
    saved = find_checkpoint(run, checkpoint)
    model, config, _, step = load_model(run, checkpoint, overrides)
    described = config.model_dump(mode="json")
    return _Opened(model, for_evaluation(config, overrides), described, saved.name, step)


def _described(model: ModelConfig, actions: Any) -> dict[str, Any]:
    return {"model": model.model_dump(mode="json"), "actions": actions.model_dump(mode="json")}


def _fill(
    writer: FeatureFile,
    split: FileSplit,
    images: _Labelled,
    encoder: VisionTransformer,
    pool: Pool,
    tell: Callable[[int, int], None] | None,
    out: Path,
) -> int:
    """Encode every image into ``writer``; return their number. Raise UserError once too many cannot be decoded."""
    count = 0
    with evaluating(encoder):
        for pictures, rows in split.numbered():
            split.left_out.check()
            with writing(out):
                writer.add(images.rows(rows, _encoded(encoder, pictures, pool)))
            count += len(rows)
            if tell is not None and count + len(split.bad) < len(split):
                tell(count + len(split.bad), len(split))
    split.left_out.check()
    split.require_some(count)
    if tell is not None:
        tell(len(split), len(split))
    return count


def _encoded(encoder: VisionTransformer, pictures: Tensor, pool: Pool) -> NDArray[np.float32]:
    tokens = encoder(pictures.to(device_of(encoder))).unflatten(0, (len(pictures), -1)).float()  # (b, L, D)
    kept = tokens.mean(dim=1) if pool == "mean" else tokens
    found: NDArray[np.float32] = kept.cpu().numpy()
    return found


@dataclass
class _Labelled:
    """Images with their keys, and with labels and splits if they have any.

    A folder that holds the folders of splits (train/, test/) has its classes below these.
    """

    files: ImageSet
    place: str

    def rows(self, rows: NDArray[np.int64], features: NDArray[np.float32]) -> Rows:
        """Return the images of these rows."""
        keys = [self.files.source_name(row) for row in rows.tolist()]
        splits = None if self.splits is None else [self.splits[row] for row in rows.tolist()]
        return Rows(keys, features, None if self.labels is None else self.labels[rows], splits)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """int64 (n,), -1 for none; None if no image has a class."""
        return self._found[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return self._found[1]

    @cached_property
    def splits(self) -> list[str] | None:
        """Each image's split folder, "" for an image beside these folders; None if there are none."""
        if self.files.source.kind != "folder":
            return None
        tops = [_top(self.files.source_name(row)) for row in range(len(self.files))]
        kinds = {split_kind(top) for top in set(tops)}
        return tops if "train" in kinds and kinds & {"test", "val"} else None

    @cached_property
    def _found(self) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
        if self.splits is None:
            refuse_masks(self.files.classes, self.place)
            return self.files.labels, self.files.classes
        names = [self.files.source_name(row) for row in range(len(self.files))]
        labels, classes = folder_labels([name.removeprefix(f"{_top(name)}/") for name in names])
        refuse_masks(classes, f"{self.place}/{next(filter(None, self.splits))}")
        return labels, classes


def _top(name: str) -> str:
    """Return the first folder of a name, "" if it is in none."""
    return name.split("/", 1)[0] if "/" in name else ""
