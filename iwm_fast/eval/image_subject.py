"""The input of image evaluations: a model, the data, and features that several of them share, read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from iwm_fast.actions.ranges import varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.console import Count, part_of
from iwm_fast.eval.feature_cache import FeatureCache, Features
from iwm_fast.eval.features import EncoderName, Kept, announce, encoder_of, read_features
from iwm_fast.eval.registry import Need
from iwm_fast.eval.splits import Split, cannot_classify
from iwm_fast.models.iwm import IWM

__all__ = ["ImageSubject"]

_STILL = "the configuration has no colour jitter (actions.strength), so no distinct actions"


@dataclass
class ImageSubject:
    """A model and labelled or unlabelled images.

    which: the evaluated encoder. untrained: the network before its first step, if it is evaluated too. images: number
    ranked for MRR, default ``eval.mrr_images``; queries: actions per bank, default all. components: also rank banks of
    each action component alone, of ``component_images`` of the images, default all.
    """

    model: IWM
    config: Config
    space: ActionSpace
    test: Split
    train: Split | None
    which: EncoderName
    untrained: IWM | None = None
    images: int | None = None
    queries: int | None = None
    components: bool = False
    component_images: int | None = None
    cache: FeatureCache | None = None
    progress: Count | None = None

    @property
    def models(self) -> list[IWM]:
        """The model, then the untrained one, if any."""
        return [self.model] if self.untrained is None else [self.model, self.untrained]

    def tell(self, what: str) -> Callable[[int, int], None] | None:
        """Return a callback for (done, total) of a part of the work."""
        return part_of(self.progress, what)

    def missing(self, need: Need) -> str | None:
        """Return why a need is not met, or None."""
        if need == "jitter":
            return None if varying(self.config.actions) else _STILL
        if need == "classes":
            return cannot_classify(self.train, self.test)
        return "no training images were given" if self.train is None else None

    def learned_from(self) -> Split:
        """Return the training images; an evaluation that uses them must declare the need."""
        if self.train is None:
            raise ValueError("there are no training images: declare the need in the evaluation's registry entry")
        return self.train

    def features(self, keep: Kept) -> Iterator[tuple[str, IWM, Features, Features]]:
        """Yield (name suffix, model, training features, test features), for the model and for the untrained one.

        All images are read once for both; mean tokens once for all evaluations.
        """
        both = self._pooled if keep == "pooled" else self._read(keep)
        return zip(("", "_untrained"), self.models, *both, strict=False)

    @cached_property
    def _pooled(self) -> tuple[list[Features], list[Features]]:
        return self._read("pooled")

    def _read(self, keep: Kept) -> tuple[list[Features], list[Features]]:
        encoders = [encoder_of(model, self.which) for model in self.models]
        announce(encoders, (self.learned_from(), self.test), keep, self.cache)
        train, test = (
            read_features(encoders, split, keep, cache=self.cache, progress=self.tell(f"features, {name}"))
            for name, split in (("train", self.learned_from()), ("test", self.test))
        )
        return train, test
