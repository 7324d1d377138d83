"""The stream of triplets: order, batches, masks and bad files as for images, with several files per sample.

A micro-batch of B triplets passes the one DALI graph as the frames that they show, each once, with no augmentation
except a crop and a flip that all images of a triplet share (then frames are shared within a triplet alone). Masks are
sampled as usual; the action is the manifest's. With `model.history` a source is the frames up to its own; with
`train.horizon` a sample goes on with the triplets that follow, as far as its episode has them.

Legend: H = model.history, T = train.horizon.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.transforms import Geometry, Views
from iwm_fast.config.schema import ActionsConfig
from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.decode.encoded import BadSample, Encoded
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.masks import PatchSets
from iwm_fast.data.samples import FileStore, SampleReader, Samples, candidates
from iwm_fast.data.triplet_windows import continuations, windows
from iwm_fast.data.triplets import Triplets
from iwm_fast.data.views.graph import RenderedViews
from iwm_fast.data.views.sampling import draw_views

__all__ = ["PairReader", "PairSamples", "PairStream", "pair_views"]

Ints = NDArray[np.int64]


@dataclass
class PairSamples(Samples):
    """B triplets that show U different frames: ids and epochs (B,); files (U,), encoded and size of the frames.

    triplets: int64 (B, T), the triplets of each sample: ids[i], unless one of its images is bad, and those that follow,
    −1 after its last step. places: int64 (B, H + T), rows of the U: a sample's source, the oldest frame first, then the
    targets, −1 after the last step. owner: int64 (U,), the first sample that shows a frame.
    """

    triplets: Ints
    places: Ints
    owner: Ints


class PairReader(SampleReader):
    """Reads triplets by id and replaces those with a bad image: a function of (seed, epoch, id) and of which files are
    bad. A sample has the steps of its own triplet, whichever replaces it: every rank knows their number.

    shared: whether samples share frames, because nothing is done to them.
    """

    def __init__(
        self,
        triplets: Triplets,
        store: FileStore,
        seed: int,
        bad: BadSamples,
        *,
        history: int = 1,
        horizon: int = 1,
        shared: bool = True,
    ) -> None:
        super().__init__(store, seed, bad)
        self.rows = continuations(triplets, horizon)  # (n, T)
        self.steps = (self.rows >= 0).sum(axis=1)
        targets = np.where(self.rows < 0, -1, triplets.target[self.rows])
        self.frames = np.concatenate([windows(triplets, history), targets], axis=1)  # (n, H + T)
        self.shared, self.history = shared, history

    def expect(self, ids: Ints) -> None:
        """Check all images of the triplets."""
        self.store.expect(self._files(ids))

    def read(self, ids: Ints, epochs: Ints) -> PairSamples:
        """Return the triplets of a batch. Raises UserError where too many files are bad."""
        chosen, held = ids.copy(), dict[int, Encoded]()
        self.store.ask(self._files(ids).tolist())
        for row, triplet in enumerate(ids.tolist()):
            if not self._get(triplet, int(epochs[row]), triplet, held):
                chosen[row] = self._other(triplet, int(epochs[row]), held)
        self.bad.check()
        return self._samples(ids, epochs, chosen, held)

    def replace(self, samples: Samples, reasons: dict[int, str]) -> PairSamples:
        """Return the batch after its rows in `reasons` (of U) failed to decode."""
        assert isinstance(samples, PairSamples)
        chosen = samples.triplets[:, 0].copy()
        held = dict(zip(samples.files.tolist(), samples.encoded, strict=True))
        for row, reason in reasons.items():
            file, owner = int(samples.files[row]), samples.owner[row]
            self.store.refuse(file, reason)
            self.bad.add(self.store.images.name(file), reason, int(samples.epochs[owner]), int(samples.ids[owner]))
            held.pop(file, None)
        for row in np.flatnonzero(np.isin(samples.places, list(reasons)).any(axis=1)).tolist():
            chosen[row] = self._other(int(samples.ids[row]), int(samples.epochs[row]), held)
        self.bad.check()
        return self._samples(samples.ids, samples.epochs, chosen, held)

    def _files(self, ids: Ints) -> Ints:
        """The files of the triplets, each once."""
        files = np.unique(self.frames[ids])
        return files[files >= 0]

    def _samples(self, ids: Ints, epochs: Ints, chosen: Ints, held: dict[int, Encoded]) -> PairSamples:
        gone = np.arange(self.rows.shape[1]) >= self.steps[ids][:, None]  # a replacement may have more
        frames, triplets = self.frames[chosen], np.where(gone, -1, self.rows[chosen])
        frames[:, self.history :][gone] = -1
        shown = frames >= 0
        keys = frames if self.shared else frames + np.arange(len(frames))[:, None] * len(self.store.images)
        _, first, inverse = np.unique(keys[shown], return_index=True, return_inverse=True)
        places = np.full(frames.shape, -1)
        places[shown] = inverse
        files, owner = frames[shown][first], np.nonzero(shown)[0][first]
        return PairSamples(ids, epochs, files, [held[file] for file in files.tolist()], triplets, places, owner)

    def _get(self, triplet: int, epoch: int, sample: int, held: dict[int, Encoded]) -> bool:
        """Read a triplet's images into `held`; False where one is bad, which is recorded."""
        files = self.frames[triplet, : self.history + self.steps[sample]].tolist()
        for file in files:
            self.bad.tried([file])
            if file in held:
                continue
            try:
                held[file] = self.store.get(file)
            except BadSample as bad:
                self.bad.add(self.store.images.name(file), bad.reason, epoch, sample)
                self.bad.check()
                return False
        source = held[files[self.history - 1]]
        for file in (*files[self.history :], *files[: self.history]):
            if (held[file].width, held[file].height) != (source.width, source.height):
                self.bad.add(self.store.images.name(file), _unlike(source, held[file]), epoch, sample)
                return False
        return True

    def _other(self, sample: int, epoch: int, held: dict[int, Encoded]) -> int:
        """Another triplet for one with a bad image, chosen as for images; its episode goes on as long."""
        for triplet in candidates(self.seed, epoch, sample, len(self.frames)):
            if self.steps[triplet] >= self.steps[sample] and self._get(triplet, epoch, sample, held):
                return triplet
        raise self.bad.all_bad()


def _unlike(source: Encoded, other: Encoded) -> str:
    return (
        f"{other.width} x {other.height} pixels, and the source of its triplet {source.width} x {source.height}: "
        "they must be of one size"
    )


def pair_views(actions: ActionsConfig, seed: int, samples: PairSamples) -> Views:
    """Return the views of a batch's U frames: whole, or with the crop and flip sampled for their triplet."""
    size, of = samples.size, samples.owner
    drawn = draw_views(actions, seed, samples.epochs[of], samples.ids[of], size).target_geometry
    if actions.crop_scale == (1.0, 1.0):  # the whole image, whatever its aspect
        drawn = Geometry(np.concatenate([np.zeros_like(size), size], axis=1), drawn.flip, drawn.rotation)
    return replace(Views.neutral(size, drawn.crop), target_geometry=drawn, source_geometry=drawn)


class PairStream(TrainingStream):
    """`TrainingStream` over `Triplets`."""

    _bases = True
    _vectors: NDArray[np.float32]
    _all_steps: Ints  # of every triplet

    @property
    def files_a_sample(self) -> int:
        """The frames of a source, and its targets."""
        return self._config.model.history + self._config.train.horizon

    def _reader_of(self, files: Sized, run_dir: Path | None) -> SampleReader:
        assert isinstance(files, Triplets)
        self._vectors = files.vectors()
        actions, train = self._config.actions, self._config.train
        bad = BadSamples(len(files.frames), self._config.data.max_bad_fraction, run_dir)
        untouched = actions.crop_scale == (1.0, 1.0) and not actions.flip_probability
        reader = PairReader(
            files, self._store_of(files.frames), train.seed, bad,
            history=self._config.model.history, horizon=train.horizon, shared=untouched,
        )  # fmt: skip
        self._all_steps = reader.steps
        return reader

    def _predicted(self, ids: Ints, patches: PatchSets) -> int:
        if self._config.train.horizon == 1:
            return super()._predicted(ids, patches)
        return int(self._all_steps[ids].sum()) * self._config.model.grid**2

    def _steps(self, samples: Samples) -> Ints | None:
        return self._all_steps[samples.ids] if self._config.train.horizon > 1 else None

    def _draw(self, samples: Samples) -> Views:
        assert isinstance(samples, PairSamples)
        return pair_views(self._config.actions, self._config.train.seed, samples)

    def _pairs(
        self, rendered: RenderedViews, samples: Samples, views: Views
    ) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
        del views
        assert isinstance(samples, PairSamples)
        frames, history = rendered.base, self._config.model.history  # (U, S, S, 3)
        seen, reached = samples.places[:, :history].reshape(-1), samples.places[:, history:].T.reshape(-1)
        rows = samples.triplets.T.reshape(-1)  # all first steps, then all second ones
        source, target = (frames[torch.from_numpy(p[p >= 0]).to(frames.device)] for p in (seen, reached))
        if frames.is_cuda:  # the step's stream need not be this thread's
            torch.cuda.current_stream(frames.device).synchronize()
        return source, target, self._vectors[rows[rows >= 0]]
