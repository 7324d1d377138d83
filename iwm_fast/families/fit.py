"""Fit a converted encoder to the architecture of a configuration: compare, resize, fold the normalisation of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from iwm_fast.config.encoders import ENCODERS, EncoderArchitecture, EncoderShape
from iwm_fast.errors import UserError
from iwm_fast.families.converted import HALF, IMAGENET, Converted, LazyTensors, Pixels
from iwm_fast.families.network import usual_heads
from iwm_fast.families.recognise import summary
from iwm_fast.families.resize import resample_patches, resize_positions
from iwm_fast.models.positions import sincos_positions

__all__ = ["Fitted", "PixelsChoice", "fit_encoder", "value_text"]

PixelsChoice = Literal["auto", "imagenet", "half"]


@dataclass(frozen=True)
class Fitted:
    """An encoder as the configuration has it.

    encoder, target: its state, made tensor by tensor, fp32. record: for JSON. said: clauses for the terminal.
    """

    encoder: LazyTensors
    target: LazyTensors | None
    record: dict[str, Any]
    said: tuple[str, ...]


def fit_encoder(
    place: str, found: Converted, wanted: EncoderArchitecture, pixels: PixelsChoice = "auto", *, frozen: bool = False
) -> Fitted:
    """Return the encoder for an architecture.

    place: of the file, for errors. pixels: what its first layer expects; auto: what the file says, else ImageNet's.
    frozen: the architecture is that of model.target_encoder. Raises UserError where a tensor does not fit, with the
    keys to set.
    """
    _require_fit(place, found, wanted, frozen=frozen)
    given = found.pixels or IMAGENET if pixels == "auto" else {"imagenet": IMAGENET, "half": HALF}[pixels]
    own = found.architecture
    record: dict[str, Any] = {"family": found.family, "architecture": _document(own, heads=found.heads_known)}
    said = list(found.folded)
    states = [_fitted(state, found, wanted, given) for state in (found.encoder, found.target) if state is not None]
    resized: list[str] = []
    if own.positions == wanted.positions == "learned" and own.grid != wanted.grid:
        resized.append(
            f"positions interpolated from {own.grid}×{own.grid} to {wanted.grid}×{wanted.grid} ({found.positions})"
        )
    if own.patch != wanted.patch:
        resized.append(f"patch embedding resampled from {own.patch} to {wanted.patch} pixels ({found.patches})")
    record |= {"folded": list(found.folded), "resized": resized, "left_out": sorted(found.left_out)}
    record["pixels"] = {"mean": list(given.mean), "std": list(given.std), "said_by": _said_by(found, pixels)}
    if given != IMAGENET:
        record["folded"].append(f"pixels of {given} into the patch projection")
        said.append(f"pixels of {given} into the patch projection")
    clauses = [f"{' and '.join(said)} folded"] if said else []
    clauses += resized
    if pixels == "auto" and found.pixels is None:
        clauses.append("the file does not say its pixels' normalisation, so ImageNet's is assumed (model.init_pixels)")
    notes = [*found.notes]
    if not found.heads_known:
        notes.append(f"{wanted.shape.heads} heads as configured, the file does not say")
        usual = usual_heads(wanted.shape.width)
        if usual not in (None, wanted.shape.heads):
            notes[-1] += f", and a width of {wanted.shape.width} usually has {usual}"
    record["notes"] = notes
    clauses += notes
    if found.left_out:
        clauses.append(f"left out: {summary(found.left_out)}")
    return Fitted(states[0], states[1] if len(states) > 1 else None, record, tuple(clauses))


def _said_by(found: Converted, pixels: PixelsChoice) -> str:
    if pixels != "auto":
        return "model.init_pixels"
    return "nothing: ImageNet's is assumed" if found.pixels is None else "the weights' files or family"


def _document(architecture: EncoderArchitecture, *, heads: bool) -> dict[str, Any]:
    shape = architecture.shape.model_dump(mode="json")
    if not heads:
        shape["heads"] = None
    return {
        "shape": shape, "image": architecture.image or None, "patch": architecture.patch,
        "prefix_tokens": architecture.prefix_tokens, "positions": architecture.positions,
        "norm_eps": architecture.norm_eps, "rope_base": architecture.rope_base,
    }  # fmt: skip


def _fitted(state: LazyTensors, found: Converted, wanted: EncoderArchitecture, pixels: Pixels) -> LazyTensors:
    """An encoder's tensors at the sizes of an architecture, for pixels normalised by ImageNet's numbers."""
    made: dict[str, Callable[[], Tensor]] = {name: partial(_fp32, state, name) for name in state}
    made["patch_embed.proj.weight"] = partial(_weight, state, wanted.patch, pixels)
    made["patch_embed.proj.bias"] = partial(_bias, state, wanted.patch, pixels)
    if wanted.positions == "learned":
        if "pos_embed" in state:
            made["pos_embed"] = lambda: resize_positions(state["pos_embed"], wanted.grid, found.positions)
        else:
            made["pos_embed"] = partial(sincos_positions, wanted.shape.width, wanted.grid)
    else:
        made.pop("pos_embed", None)
    return LazyTensors(made)


def _fp32(state: Mapping[str, Tensor], name: str) -> Tensor:
    return state[name].float()


def _weight(state: Mapping[str, Tensor], patch: int, pixels: Pixels) -> Tensor:
    """Wherever ImageNet's normalisation has x, the weights' has (s x + m − mean) / std."""
    weight = resample_patches(state["patch_embed.proj.weight"], patch)
    if pixels == IMAGENET:
        return weight
    factor = torch.tensor(IMAGENET.std, dtype=torch.float64) / torch.tensor(pixels.std, dtype=torch.float64)
    return (weight.double() * factor.view(1, 3, 1, 1)).float()


def _bias(state: Mapping[str, Tensor], patch: int, pixels: Pixels) -> Tensor:
    bias = state["patch_embed.proj.bias"].float()
    if pixels == IMAGENET:
        return bias
    weight = resample_patches(state["patch_embed.proj.weight"], patch).double().sum((2, 3))
    means = [torch.tensor(one.mean, dtype=torch.float64) for one in (IMAGENET, pixels)]
    return (bias.double() + weight @ ((means[0] - means[1]) / torch.tensor(pixels.std, dtype=torch.float64))).float()


def _require_fit(place: str, found: Converted, wanted: EncoderArchitecture, *, frozen: bool) -> None:
    """Raise UserError with the first thing that does not fit, and all keys to set."""
    why = next(_misfits(found, wanted), None)
    if why is not None:
        raise UserError(f"{place}: {why}: set {_keys(found, wanted, frozen=frozen)}")
    own = found.architecture
    keys = _keys(found, wanted, frozen=frozen)
    if own.patch != wanted.patch and found.patches == "none":
        name = _tensor(found, "patch_embed.proj.weight")
        raise UserError(
            f"{place}: {name} is for patches of {own.patch} pixels, and model.patch is {wanted.patch}; {found.family} "
            f"has no rule that resamples them: set {keys}"
        )
    learned = own.positions == wanted.positions == "learned" and not found.fixed_positions
    if learned and own.grid != wanted.grid and found.positions == "sin-cos":
        raise UserError(
            f"{place}: {_tensor(found, 'pos_embed')} is for {own.grid}×{own.grid} patches, and {found.family} has no "
            f"rule that interpolates learned positions: set model.image={own.grid * wanted.patch}"
        )


def _tensor(found: Converted, ours: str) -> str:
    return found.names.get(ours, ours)


def _misfits(found: Converted, wanted: EncoderArchitecture) -> Iterator[str]:
    """What does not fit, each as text to follow the file's name."""
    own, shape = found.architecture, wanted.shape
    hidden = [round(one.width * one.mlp_ratio) for one in (own.shape, shape)]
    sizes = {
        "norm.weight": ((own.shape.width,), (shape.width,)),
        "blocks.0.mlp.w_in": ((hidden[0], own.shape.width), (hidden[1], shape.width)),
    }
    for name, (there, here) in sizes.items():
        if there != here:
            told = ["×".join(map(str, one)) for one in (there, here)]
            yield f"{_tensor(found, name)} is {told[0]} there and {told[1]} in the configuration"
    if own.shape.depth != shape.depth:
        yield f"it has {own.shape.depth} blocks, and the configuration {shape.depth}"
    if found.heads_known and own.shape.heads != shape.heads:
        yield f"its attention has {own.shape.heads} heads, and the configuration's {shape.heads}"
    if own.prefix_tokens != wanted.prefix_tokens:
        name = f"{_tensor(found, 'prefix')}: " if own.prefix_tokens else ""
        yield f"{name}{own.prefix_tokens} prefix tokens there and {wanted.prefix_tokens} in the configuration"
    if not _positions_fit(found, wanted):
        yield _positions_misfit(found, wanted)
    if own.norm_eps != wanted.norm_eps:
        yield f"its normalisations have an eps of {own.norm_eps:g}, and model.norm_eps is {wanted.norm_eps:g}"
    if wanted.positions == "rope" and own.rope_base != wanted.rope_base:
        yield f"its rotations have base {own.rope_base:g}, and model.rope_base is {wanted.rope_base:g}"


def _positions_fit(found: Converted, wanted: EncoderArchitecture) -> bool:
    own = found.architecture
    if own.positions == wanted.positions:
        return True
    if wanted.positions == "sincos":
        return (
            own.positions == "learned"
            and found.fixed_positions
            and (own.grid == wanted.grid or found.positions == "sin-cos")
        )
    return own.positions == "sincos" and wanted.positions == "learned"


def _positions_misfit(found: Converted, wanted: EncoderArchitecture) -> str:
    own = found.architecture
    if own.positions == "rope":
        return f"its positions are rotations in every block, and model.positions is {wanted.positions}"
    if own.positions == "sincos" or wanted.positions == "rope":
        return f"its positions are {own.positions}, and model.positions is {wanted.positions}"
    if found.fixed_positions:
        return (
            f"{_tensor(found, 'pos_embed')} is the table of sines and cosines of {own.grid}×{own.grid} patches, which "
            f"{found.family} interpolates for {wanted.grid}×{wanted.grid}, and model.positions is sincos"
        )
    return f"{_tensor(found, 'pos_embed')} is learned, and model.positions is sincos"


def _keys(found: Converted, wanted: EncoderArchitecture, *, frozen: bool) -> str:
    """The keys to set, as arguments of a command line: all whose value differs."""
    own = found.architecture
    shape = own.shape
    if not found.heads_known and (own.shape.width, own.shape.depth) == (wanted.shape.width, wanted.shape.depth):
        shape = own.shape.model_copy(update={"heads": wanted.shape.heads})
    positions = own.positions
    if positions == "learned" and found.fixed_positions and (own.grid == wanted.grid or found.positions == "sin-cos"):
        positions = "sincos"
    parts: dict[str, tuple[object, object]] = {
        "prefix_tokens": (own.prefix_tokens, wanted.prefix_tokens),
        "positions": (positions, wanted.positions),
        "norm_eps": (own.norm_eps, wanted.norm_eps),
    }
    base = own.rope_base != wanted.rope_base and positions == "rope"
    texts = []
    if frozen:
        usual = {"prefix_tokens": 0, "positions": "sincos", "norm_eps": 1e-6}
        told = (f"{key}: {value_text(value)}" for key, (value, _) in parts.items() if value != usual[key])
        inner = [f"encoder: {_shape(shape)}", *told]
        texts.append(f"'model.target_encoder={{{', '.join(inner)}}}'")
    else:
        if shape != wanted.shape:
            text = f"model.encoder={_shape(shape)}"
            texts.append(f"'{text}'" if "{" in text else text)
        texts += [f"model.{key}={value_text(value)}" for key, (value, now) in parts.items() if value != now]
    if base:
        texts.append(f"model.rope_base={own.rope_base:g}")
    if own.patch != wanted.patch:
        texts.append(f"model.patch={own.patch}")
        if wanted.image % own.patch:
            texts.append(f"model.image={own.image or own.patch * round(wanted.image / own.patch)}")
    return " ".join(texts)


def value_text(value: object) -> str:
    """Return a key's value as a command line takes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shape(shape: EncoderShape) -> str:
    for name, size in ENCODERS.items():
        if size == shape:
            return name
    ratio = "" if shape.mlp_ratio == 4.0 else f", mlp_ratio: {shape.mlp_ratio:g}"
    return f"{{depth: {shape.depth}, width: {shape.width}, heads: {shape.heads}{ratio}}}"
