"""What a family's module makes of a file: an encoder under our names, its architecture, and how it was stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from iwm_fast.config.encoders import EncoderArchitecture
from iwm_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["HALF", "IMAGENET", "Converted", "LazyTensors", "Pixels", "PredictorWeights", "Source"]

# Rules by which positions move to another grid (`resize`), and what a family says about patches of another side.
PositionRule = Literal["antialiased bicubic", "bicubic", "bicubic with an offset of 0.1", "sin-cos", "none"]
PatchRule = Literal["pseudo-inverse", "none"]


@dataclass(frozen=True)
class Pixels:
    """A normalisation of RGB in 0..1: (x − mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"mean {_numbers(self.mean)} and std {_numbers(self.std)}"


IMAGENET = Pixels(IMAGENET_MEAN, IMAGENET_STD)
HALF = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is read, so that a large file is not held twice."""

    def __init__(self, made: Mapping[str, Callable[[], Tensor]]) -> None:
        self._made = dict(made)

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def replaced(self, made: Mapping[str, Callable[[], Tensor]]) -> LazyTensors:
        """Return these tensors with some others in their place."""
        return LazyTensors(self._made | dict(made))

    def without(self, *names: str) -> LazyTensors:
        """Return these tensors without some."""
        return LazyTensors({name: make for name, make in self._made.items() if name not in names})


@dataclass(frozen=True)
class Source:
    """Tensors of one network in a file, without the prefix that all their names share.

    place: of the file or folder, for errors. tensors: by name. config: its folder's config.json, {} without one.
    pixels: what the folder's files say of its input.
    """

    place: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    pixels: Pixels | None = None


@dataclass(frozen=True)
class PredictorWeights:
    """A predictor under our names. heads: None where the file does not say. encoder_width: of the tokens it reads."""

    tensors: Mapping[str, Tensor]
    width: int
    depth: int
    hidden: int
    encoder_width: int
    heads: int | None = None


@dataclass(frozen=True)
class Converted:
    """An encoder under our names, at the sizes of its file.

    architecture: of the file; the number of heads is the file's only where `heads_known`. encoder: includes `prefix`
    (P, D) and `pos_embed` (L, D) where it has them; LayerScale is folded in. target: the target encoder that the file
    has beside it. fixed_positions: `pos_embed` is the table of sines and cosines, so that an encoder with fixed
    positions computes the same. positions, patches: the family's rules for other sizes. names: of tensors in the file,
    by ours, for errors. folded, notes, left_out: for the record.
    """

    family: str
    architecture: EncoderArchitecture
    encoder: LazyTensors
    heads_known: bool
    positions: PositionRule
    patches: PatchRule
    pixels: Pixels | None
    names: Mapping[str, str]
    target: LazyTensors | None = None
    fixed_positions: bool = False
    folded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def _numbers(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "(" + ", ".join(f"{v:g}" for v in values) + ")"
