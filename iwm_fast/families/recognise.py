"""Tell a file's family by its tensors' names, and convert it.

Networks lie in files under prefixes (``module.``, ``backbone.``, ``teacher.backbone.``, ``vit.``), one of several where
a training saved more than one. The patch embedding's name, which every family has once, tells where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from iwm_fast.errors import UserError
from iwm_fast.families import dinov2, dinov3, ijepa, mae, timm_models, transformers_models
from iwm_fast.families.converted import Converted, LazyTensors, PredictorWeights, Source
from iwm_fast.families.files import Contents

__all__ = ["KNOWN", "predictor_of", "recognise", "summary"]

KNOWN = (
    "runs and exports of iwm-fast; timm's VisionTransformer and DINOv3; I-JEPA, MAE, DINOv2 and DINOv3 under their own "
    "names; IJepaModel, ViTModel, ViTMAEModel, Dinov2Model, Dinov2WithRegistersModel and DINOv3ViTModel of transformers"
)
_ANCHOR = re.compile(
    r"(?:(?P<prefix>.*)\.)?(?:patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?)\.weight"
)
# Of several networks, the one to take: the average of a training's weights before the weights.
_PREFERRED = ("teacher", "ema", "target_encoder", "encoder", "module", "model", "student")
_SHOWN = 4


def recognise(contents: Contents) -> Converted:
    """Return the encoder of a file, with its target encoder and predictor where it has them. Raises UserError."""
    prefixes = sorted(
        (match["prefix"] + "." if match["prefix"] else "")
        for name in contents.tensors
        if (match := _ANCHOR.fullmatch(name))
    )
    if not prefixes:
        raise UserError(f"{contents.place}: {_has(contents.tensors)}, no family known here; known are {KNOWN}")
    chosen, target = _chosen(contents, prefixes)
    source = _below(contents, chosen)
    found = _convert(source, released=target is not None)
    notes = found.notes
    if len(prefixes) > 1 and target is None:
        notes = (*notes, f"{chosen.rstrip('.')} of the file's {len(prefixes)} networks")
    outside = {name for name in contents.tensors if not name.startswith(chosen)}
    encoder_of_target: LazyTensors | None = None
    if target is not None:
        other = _convert(_below(contents, target), released=True)
        if other.architecture != found.architecture:
            raise UserError(
                f"{contents.place}: its encoder and its target encoder differ in size; give one file of each"
            )
        encoder_of_target = other.encoder
        outside = {name for name in outside if not name.startswith(target)}
    left_out = (*found.left_out, *sorted(outside))
    return replace(found, target=encoder_of_target, notes=notes, left_out=left_out)


def predictor_of(contents: Contents) -> tuple[PredictorWeights, tuple[str, ...]] | None:
    """Return I-JEPA's predictor of a file, and names of what is left out; None where it has none. Raises UserError."""
    names = [name for name in contents.tensors if re.fullmatch(rf"(.*\.)?{re.escape(ijepa.PREDICTOR)}", name)]
    if not names:
        return None
    prefix = names[0].removesuffix(ijepa.PREDICTOR)
    predictor = ijepa.predictor_to_ours(_below(contents, prefix))
    return predictor, tuple(name for name in contents.tensors if not name.startswith(prefix) or not prefix)


def summary(names: Iterable[str]) -> str:
    """Return names as counts by their first part, without numbers: "decoder (98 tensors), mask_token"."""
    counts: dict[str, int] = {}
    for name in names:
        first = name.removeprefix("embeddings.").split(".")[0]
        first = re.sub(r"^(decoder|predictor)_.*", r"\1", first)
        counts[first] = counts.get(first, 0) + 1
    return ", ".join(f"{name} ({count} tensors)" if count > 1 else name for name, count in counts.items())


def _has(names: Mapping[str, Tensor]) -> str:
    if not names:
        return "has no tensors"
    first = ", ".join(list(names)[:_SHOWN])
    return f"has {first}{f' and {len(names) - _SHOWN} more tensors' if len(names) > _SHOWN else ''}"


def _chosen(contents: Contents, prefixes: list[str]) -> tuple[str, str | None]:
    """The prefix of the encoder, and of its target encoder where the file has both."""
    targets = [prefix for prefix in prefixes if "target_encoder" in prefix]
    others = [prefix for prefix in prefixes if re.search(r"(^|\.)encoder\.", prefix)]
    if len(prefixes) == 2 and len(targets) == len(others) == 1:  # one of each
        return others[0], targets[0]
    if len(prefixes) == 1:
        return prefixes[0], None
    for word in _PREFERRED:
        having = [prefix for prefix in prefixes if word in re.split(r"[._]", prefix) or word in prefix.split(".")]
        if len(having) == 1:
            return having[0], None
    listed = ", ".join(prefix.rstrip(".") or "one without a prefix" for prefix in prefixes)
    raise UserError(f"{contents.place}: holds {len(prefixes)} networks ({listed}); save the one to start from alone")


def _below(contents: Contents, prefix: str) -> Source:
    tensors = LazyTensors(
        {
            name.removeprefix(prefix): partial(contents.tensors.__getitem__, name)
            for name in contents.tensors
            if name.startswith(prefix)
        }
    )
    return Source(contents.place, tensors, contents.config, contents.pixels)


def _convert(source: Source, *, released: bool) -> Converted:
    """Convert a network by its family's module. released: the file has an encoder and a target encoder, as I-JEPA's."""
    read = source.tensors
    if "blocks.0.mlp.norm_weight" in read:
        raise UserError(f"{source.place}: is an encoder of iwm-fast alone; name the folder of its run or export")
    if transformers_models.matches(read):
        return transformers_models.to_ours(source)
    if dinov3.matches(read):
        return dinov3.to_ours(source)
    if dinov2.matches(read):
        return dinov2.to_ours(source)
    if timm_models.matches_dinov3(read):
        return timm_models.to_ours_dinov3(source)
    if "architecture" not in source.config:
        if mae.matches(read):
            return mae.to_ours(source)
        if ijepa.matches(read):
            found = ijepa.to_ours(source)
            if released or found.fixed_positions:
                return found
    if timm_models.matches(read):
        return timm_models.to_ours(source)
    raise UserError(f"{source.place}: {_has(read)}, no family known here; known are {KNOWN}")
