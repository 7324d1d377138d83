"""Write views, masks and their parameters as pictures and JSON, for a person or a program to check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.actions.external import space_of
from iwm_fast.actions.ranges import corruptions_drawn
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import JITTER, Corruption, Geometry, Jitter, Views, component
from iwm_fast.config.schema import Config
from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.image_list import list_images
from iwm_fast.data.masks import PatchSets, mask_sampler
from iwm_fast.data.order import SampleOrder
from iwm_fast.data.samples import FileStore, SampleReader, Samples
from iwm_fast.data.shard_order import shard_order
from iwm_fast.data.tools.contact_sheet import write_contact_sheet
from iwm_fast.data.views.devices import dali_device, dali_threads
from iwm_fast.data.views.graph import BadRows, RenderedViews, ViewGraph
from iwm_fast.data.views.sampling import draw_views
from iwm_fast.errors import UserError, because
from iwm_fast.outputs import require_folder

__all__ = ["write_preview"]

_AT_ONCE = 16
_HIDDEN = 128  # the grey level of invisible patches


def write_preview(config: Config, root: str | Path, out: Path, count: int, seed: int) -> tuple[Path, int]:
    """Write the first `count` samples of a training on `root` with this configuration and seed to the folder `out`.

    Files: NNN_base.png (the target's crop: decoded, resized, flipped), NNN_target.png, NNN_source.png, NNN_masked.png
    (the source's visible patches); with the geometric group NNN_source_base.png; and params.json, one object per
    sample, with the factors that the operators used. With several sources the second is NNN_source_1.png and so on, and
    the object's more_sources describes them. contact_sheet.png shows the first of them side by side. Returns its path
    and the number of images on it. Raises UserError if `root` has no usable images, and if `out` lies in it
    or cannot be written.
    """
    if config.actions.is_external:
        raise UserError(
            f"{root}: a preview shows the transformations of images, and triplets have none; open their frames instead"
        )
    require_folder(out, read=root)
    files = list_images(root, config.data.source)
    bad = BadSamples(len(files), config.data.max_bad_fraction)
    reader = SampleReader(FileStore(files, config.data.max_pixels), seed, bad)
    geometric = config.actions.geometric
    sources = config.views.sources_per_target
    graph = ViewGraph(
        config.model.image,
        min(count, _AT_ONCE),
        dali_device(config.data.device),
        dali_threads(config.data.threads),
        geometric=geometric,
        sources=sources,
        corruptions=[corruption.name for corruption in corruptions_drawn(config.actions)],
        max_pixels=config.data.max_pixels,
    )
    masks = mask_sampler(config, seed)
    space = space_of(config.actions)
    order = shard_order(config, files, seed) if config.data.order == "shard" else SampleOrder(seed, len(files))
    records: list[dict[str, Any]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for first in range(0, count, _AT_ONCE):
            ids, epochs = order(first, min(first + _AT_ONCE, count))
            samples, views, rendered = _render(config, seed, reader, graph, reader.read(ids, epochs))
            patches = masks.draw(epochs, ids)
            _write_pictures(out, first, rendered, patches, config.model.patch, geometric=geometric)
            records += _records([files.name(file) for file in samples.files.tolist()], views, patches, space)
        (out / "params.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        return write_contact_sheet(out, records, geometric=geometric)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {because(error, 'choose another --out')}") from error
    finally:
        graph.close()


def _render(
    config: Config, seed: int, reader: SampleReader, graph: ViewGraph, samples: Samples
) -> tuple[Samples, Views, RenderedViews]:
    """Render the views; images that fail to decode are replaced as in training."""
    while True:
        sources = config.views.sources_per_target
        views = draw_views(config.actions, seed, samples.epochs, samples.ids, samples.size, sources=sources)
        try:
            return samples, views, graph.run(samples.encoded, views)
        except BadRows as bad:
            samples = reader.replace(samples, bad.reasons)


def _write_pictures(
    out: Path, first: int, rendered: RenderedViews, patches: PatchSets, patch: int, *, geometric: bool
) -> None:
    source = rendered.source.cpu().numpy()
    of_sources = {"source": source, "masked": _masked(source, patches, patch)}
    if geometric:
        of_sources["source_base"] = rendered.source_base.cpu().numpy()
    pictures = {"base": rendered.base.cpu().numpy(), "target": rendered.target.cpu().numpy()}
    count = len(source) // len(rendered.target)
    for k in range(count):
        pictures |= {name + (f"_{k}" if k else ""): images[k::count] for name, images in of_sources.items()}
    for name, images in pictures.items():
        for row, image in enumerate(images):
            Image.fromarray(image).save(out / f"{first + row:03d}_{name}.png")


def _masked(source: NDArray[np.uint8], patches: PatchSets, patch: int) -> NDArray[np.uint8]:
    """Return the sources (B, S, S, 3) with every patch outside the context grey."""
    count, size = source.shape[:2]
    grid = size // patch
    seen = np.zeros((count, grid * grid), bool)
    seen[np.repeat(np.arange(count), patches.context_lengths), patches.context] = True
    pixels = seen.reshape(count, grid, grid).repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
    return np.where(pixels, source, np.uint8(_HIDDEN))


def _records(names: list[str], views: Views, patches: PatchSets, space: ActionSpace) -> list[dict[str, Any]]:
    """Return one object per sample: sources, target, action and masks. views: of all sources of the samples."""
    described = _sources(views, patches, space)
    count = len(views) // len(names)
    records = []
    for first, name in zip(range(0, len(views), count), names, strict=True):
        records.append(
            {
                "file": name,
                **_geometry(views.target_geometry, first),
                "source_geometry": described[first]["source_geometry"],
                "target": _jitter(views.target, first),
                **described[first],
            }
        )
        if count > 1:
            records[-1]["more_sources"] = described[first + 1 : first + count]
    return records


def _sources(views: Views, patches: PatchSets, space: ActionSpace) -> list[dict[str, Any]]:
    """Return the part of the objects that differs by source."""
    actions = space.encode(views)
    context = np.split(patches.context, np.cumsum(patches.context_lengths)[:-1])
    target = np.split(patches.target, np.cumsum(patches.target_lengths)[:-1])
    return [
        {
            "source_geometry": None if views.shared_geometry else _geometry(views.source_geometry, row),
            "source": {
                **_jitter(views.source, row),
                **{c.column: _column(c, getattr(views, c.column)[row]) for c in space.corruptions},
            },
            "action": [float(value) for value in actions[row]],
            "action_names": list(space.names),
            "context_patches": context[row].tolist(),
            "target_patches": target[row].tolist(),
        }
        for row in range(len(views))
    ]


def _geometry(geometry: Geometry, row: int) -> dict[str, Any]:
    return {
        "crop": geometry.crop[row].tolist(),
        "flip": bool(geometry.flip[row]),
        "rotation": int(geometry.rotation[row]),
    }


def _jitter(jitter: Jitter, row: int) -> dict[str, float]:
    """Return the values by name; a unit other than a factor is part of the name."""
    values = {name: float(getattr(jitter, name)[row]) for name in JITTER}
    units = {name: component(name).unit for name in JITTER}
    return {name if units[name] == "factor" else f"{name}_{units[name]}": value for name, value in values.items()}


def _column(corruption: Corruption, value: Any) -> Any:
    """Return a number or a flag; None if the corruption was not applied and its column has a placeholder then."""
    return None if corruption.top is not None and not corruption.done(value) else value.item()
