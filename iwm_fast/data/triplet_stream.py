"""The stream of triplets: order, batches, masks and bad files as for images, with two files per sample.

A micro-batch of B triplets passes the one DALI graph as 2B images, the B sources and then the B targets, with no
augmentation except a crop and a flip that both images of a triplet share. Masks are sampled as usual; the action is the
manifest's.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.transforms import Geometry, Views
from iwm_fast.config.schema import ActionsConfig
from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.decode.encoded import BadSample, Encoded
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.samples import FileStore, SampleReader, Samples, candidates
from iwm_fast.data.triplets import Triplets
from iwm_fast.data.views.graph import RenderedViews
from iwm_fast.data.views.sampling import draw_views

__all__ = ["PairReader", "PairSamples", "PairStream", "pair_views"]

Ints = NDArray[np.int64]


@dataclass
class PairSamples(Samples):
    """B triplets: ids and epochs (B,); files (2B,), encoded and size of 2B images, sources first.

    triplets: int64 (B,), the triplet of each sample: ids[i] unless one of its images is bad.
    """

    triplets: Ints


class PairReader(SampleReader):
    """Reads triplets by id and replaces those with a bad image: a function of (seed, epoch, id) and of which files are
    bad.
    """

    def __init__(self, triplets: Triplets, store: FileStore, seed: int, bad: BadSamples) -> None:
        super().__init__(store, seed, bad)
        self.ends = np.stack([triplets.source, triplets.target], axis=1)  # (n, 2)

    def expect(self, ids: Ints) -> None:
        """Check both images of the triplets."""
        self.store.expect(np.unique(self.ends[ids]))

    def read(self, ids: Ints, epochs: Ints) -> PairSamples:
        """Return the triplets of a batch. Raises UserError where too many files are bad."""
        chosen = ids.copy()
        self.store.ask(np.unique(self.ends[ids]).tolist())
        both: list[tuple[Encoded, Encoded]] = []
        for row, triplet in enumerate(ids.tolist()):
            found = self._get(triplet, int(epochs[row]), triplet)
            if found is None:
                chosen[row], found = self._other(triplet, int(epochs[row]))
            both.append(found)
        self.bad.check()
        return self._samples(ids, epochs, chosen, both)

    def replace(self, samples: Samples, reasons: dict[int, str]) -> PairSamples:
        """Return the batch after its rows in `reasons` (of 2B) failed to decode."""
        assert isinstance(samples, PairSamples)
        count = len(samples.ids)
        chosen = samples.triplets.copy()
        both = list(zip(samples.encoded[:count], samples.encoded[count:], strict=True))
        for row, reason in reasons.items():
            file, sample, epoch = (
                int(a) for a in (samples.files[row], samples.ids[row % count], samples.epochs[row % count])
            )
            self.store.refuse(file, reason)
            self.bad.add(self.store.images.name(file), reason, epoch, sample)
        for row in sorted({row % count for row in reasons}):
            chosen[row], both[row] = self._other(int(samples.ids[row]), int(samples.epochs[row]))
        self.bad.check()
        return self._samples(samples.ids, samples.epochs, chosen, both)

    def _samples(self, ids: Ints, epochs: Ints, chosen: Ints, both: list[tuple[Encoded, Encoded]]) -> PairSamples:
        files = self.ends[chosen].T.reshape(-1)
        encoded = [one for one, _ in both] + [other for _, other in both]
        return PairSamples(ids, epochs, files, encoded, chosen)

    def _get(self, triplet: int, epoch: int, sample: int) -> tuple[Encoded, Encoded] | None:
        """Both images, or None where one is bad, which is recorded."""
        pictures = []
        for file in self.ends[triplet].tolist():
            self.bad.tried([file])
            try:
                pictures.append(self.store.get(file))
            except BadSample as bad:
                self.bad.add(self.store.images.name(file), bad.reason, epoch, sample)
                self.bad.check()
                return None
        source, target = pictures
        if (source.width, source.height) != (target.width, target.height):
            self.bad.add(self.store.images.name(int(self.ends[triplet, 1])), _unlike(source, target), epoch, sample)
            return None
        return source, target

    def _other(self, sample: int, epoch: int) -> tuple[int, tuple[Encoded, Encoded]]:
        """Another triplet for one with a bad image, chosen as for images."""
        for triplet in candidates(self.seed, epoch, sample, len(self.ends)):
            found = self._get(triplet, epoch, sample)
            if found is not None:
                return triplet, found
        raise self.bad.all_bad()


def _unlike(source: Encoded, target: Encoded) -> str:
    return (
        f"{target.width} x {target.height} pixels, and the source of its triplet {source.width} x {source.height}: "
        "they must be of one size"
    )


def pair_views(actions: ActionsConfig, seed: int, samples: Samples) -> Views:
    """Return the views of 2B images: whole, or with the crop and flip sampled for their triplet."""
    count = len(samples.ids)
    size = samples.size[:count]
    drawn = draw_views(actions, seed, samples.epochs, samples.ids, size).target_geometry
    if actions.crop_scale == (1.0, 1.0):  # the whole image, whatever its aspect
        drawn = Geometry(np.concatenate([np.zeros_like(size), size], axis=1), drawn.flip, drawn.rotation)
    geometry = Geometry.concatenate([drawn, drawn])
    return replace(Views.neutral(samples.size, geometry.crop), target_geometry=geometry, source_geometry=geometry)


class PairStream(TrainingStream):
    """`TrainingStream` over `Triplets`."""

    files_a_sample = 2
    _bases = True
    _vectors: NDArray[np.float32]

    def _reader_of(self, files: Sized, run_dir: Path | None) -> SampleReader:
        assert isinstance(files, Triplets)
        self._vectors = files.vectors()
        bad = BadSamples(len(files.frames), self._config.data.max_bad_fraction, run_dir)
        return PairReader(files, self._store_of(files.frames), self._config.train.seed, bad)

    def _draw(self, samples: Samples) -> Views:
        return pair_views(self._config.actions, self._config.train.seed, samples)

    def _pairs(
        self, rendered: RenderedViews, samples: Samples, views: Views
    ) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
        del views
        assert isinstance(samples, PairSamples)
        source, target = rendered.base.split(len(samples.ids))  # of (2B, S, S, 3)
        return source, target, self._vectors[samples.triplets]
