"""Token counts of a run's images, and how a micro-batch's are padded (`train.static_shapes`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from iwm_fast.config import Config
from iwm_fast.data.masks import mask_sampler

__all__ = ["Rounding", "Tokens", "default_multiple", "expected_padding", "padded_share", "rounding_of", "tokens_of"]

# One 48th of all patches of a micro-batch, rounded down to a power of two. Over 500 batches of the default masks: 256
# images of 14 × 14 patches (1,024) had 2.1 % more tokens and 7 pairs of sizes, 128 of 8 × 8 (128) 1.7 % and 12. Half of
# it halves the padding and has 10 and 29 pairs; twice as much 4.2 % and 3.3 %, 4 and 5.
_PARTS, _LEAST = 48, 8


@dataclass(frozen=True, eq=False)
class Tokens:
    """context, predicted: int64 (B · K,), each source's visible patches in a frame, and patches to predict.

    sources: K, of each of the B images, adjacent. history: frames of a source (`model.history`). horizon: steps of a
    source (`train.horizon`), in each of which `predicted` are predicted.
    """

    context: NDArray[np.int64]
    predicted: NDArray[np.int64]
    sources: int = 1
    history: int = 1
    horizon: int = 1

    @property
    def images(self) -> int:
        """B."""
        return len(self.context) // self.sources

    @property
    def steps(self) -> NDArray[np.int64] | None:
        """The steps of each source where there are several: an episode's end is not counted."""
        return np.full(len(self.context), self.horizon, np.int64) if self.horizon > 1 else None

    @property
    def asked(self) -> int:
        """The patches to predict in all steps."""
        return int(self.predicted.sum()) * self.horizon

    @property
    def seen(self) -> int:
        """The visible patches of all frames."""
        return int(self.context.sum()) * self.history

    def part(self, first: int, images: int) -> Tokens:
        """Return those of `images` images from `first` on."""
        rows = slice(first * self.sources, (first + images) * self.sources)
        return replace(self, context=self.context[rows], predicted=self.predicted[rows])

    def tiled(self, images: int) -> Tokens:
        """Return as many images as requested, by repeating these."""
        rows = images * self.sources
        return replace(self, context=np.resize(self.context, rows), predicted=np.resize(self.predicted, rows))


def tokens_of(config: Config, images: int) -> Tokens:
    """Return the token counts of each source of the run's first images, by the masks of training."""
    patches = mask_sampler(config).draw(np.zeros(images, np.int64), np.arange(images, dtype=np.int64))
    own = config.model.predictor.kind == "mlp"  # it predicts the context's own patches
    asked = patches.context_lengths if own else patches.target_lengths
    if config.train.horizon > 1:
        asked = np.full_like(asked, config.model.grid**2)
    return Tokens(
        patches.context_lengths, asked, config.views.sources_per_target, config.model.history, config.train.horizon
    )


@dataclass(frozen=True)
class Rounding:
    """Pads a number of tokens to a multiple of `multiple` by `segments` segments of padding of 1 to `longest` tokens.

    longest: patches of a view, so that no padding segment is longer than an image's may be: attention kernels are
    launched for the longest one.
    """

    multiple: int
    segments: int
    longest: int

    def size(self, tokens: int) -> int:
        """Return the number of tokens with padding."""
        return -(-(tokens + self.segments) // self.multiple) * self.multiple

    def padding(self, tokens: int) -> NDArray[np.int64]:
        """Return the tokens of each padding segment, int64 (segments,), as equal as possible."""
        share, more = divmod(self.size(tokens) - tokens, self.segments)
        return share + (np.arange(self.segments) < more).astype(np.int64)


def default_multiple(sources: int, patches: int) -> int:
    """Return the multiple for a micro-batch of this many frames of `patches` patches each: about 2 % of padding."""
    return max(_LEAST, 1 << max(0, (sources * patches // _PARTS).bit_length() - 1))


def rounding_of(config: Config, micro_batch: int) -> Rounding | None:
    """Return the padding of a run with micro-batches of `micro_batch` images; None without train.static_shapes."""
    if not config.train.static_shapes:
        return None
    patches = config.model.grid**2
    frames = micro_batch * config.views.sources_per_target * config.model.history
    multiple = config.train.static_multiple or default_multiple(frames, patches)
    # As few as can hold the padding: at most multiple − 1, and one token per segment.
    return Rounding(multiple, max(1, -(-(multiple - 1) // (patches - 1))), patches)


def expected_padding(config: Config, micro_batch: int) -> float:
    """Return the mean padding of one packed set, in tokens, where all remainders are as likely; 0 without
    train.static_shapes.
    """
    rounding = rounding_of(config, micro_batch)
    return 0.0 if rounding is None else rounding.segments + (rounding.multiple - 1) / 2


def padded_share(config: Config, context: NDArray[np.int64], predicted: NDArray[np.int64] | None) -> float:
    """Return the share of padding among context and predicted tokens of a micro-batch of sources of these lengths, a
    frame's.

    predicted: None where the predictor predicts its own context. 0 without train.static_shapes.
    """
    rounding = rounding_of(config, len(context) // config.views.sources_per_target)
    totals = [int(context.sum()) * config.model.history, *([] if predicted is None else [int(predicted.sum())])]
    if rounding is None:
        return 0.0
    return 1 - sum(totals) / sum(rounding.size(total) for total in totals)
