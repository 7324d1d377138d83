"""Keys of the data: where images come from and how they are decoded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from iwm_fast.config.base import (
    Count,
    NonNegative,
    Place,
    Probability,
    Section,
)
from iwm_fast.config.registry import SourceName

__all__ = ["DataConfig"]


class DataConfig(Section):
    """Where images come from and how they are decoded."""

    source: SourceName = Field(
        "auto",
        description="format of the images under root; auto detects it, and the run prints what it found; or a source "
        "that a plugin registers",
    )
    root: Place | None = Field(
        None,
        description="folder of images (sub-folders are classes), of .tar shards or of TFRecord files, on disk or as "
        "s3://bucket/prefix; a manifest of iwm-fast data index; or a manifest of triplets (docs/guides/triplets.md)",
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="where DALI decodes and augments")
    order: Literal["sample", "shard"] = Field(
        "sample",
        description="sample: each epoch is a random order of all samples, each read by itself; shard: .tar shards or "
        "TFRecord files are read from front to back by data.streams streams and shuffled in windows, so that an object "
        "store or a network disk serves few, large requests",
    )
    streams: Annotated[int, Field(ge=1, le=65536)] = Field(
        64,
        description="with data.order shard: streams that an epoch's shards are dealt to, of which every global batch "
        "takes equal shares; a multiple of the ranks, a divisor of train.global_batch, at most the number of shards",
    )
    shuffle_window: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        256,
        description="with data.order shard: consecutive samples of a stream that are shuffled together; a rank holds "
        "the encoded images of 1.25 windows of each of its streams, and at most 8 MiB more per stream",
    )
    threads: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="DALI's CPU threads; default: cores divided by the ranks of this host"
    )
    readers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None,
        description="files that a rank reads concurrently; default: 1 from disk (2 with data.order shard), 16 from an "
        "object store",
    )
    checkers: Annotated[int, Field(ge=0, le=64)] | None = Field(
        None,
        description="processes per rank that check image files on disk for damage before their first use; 0: the "
        "reading thread checks them; default: on a GPU an eighth of the rank's cores, at most 2, on a CPU 0. None "
        "start for fewer than 2,000 unchecked images (iwm-fast data index --check checks them beforehand), nor with "
        "data.order shard",
    )
    store_timeout: Annotated[float, Field(ge=0.1, le=600)] = Field(
        20.0, description="seconds without a byte from an object store (s3://) before a request is retried"
    )
    store_attempts: Count = Field(6, description="attempts per request to an object store before the run stops")
    hw_decoder_load: Probability = Field(
        0.65,
        description="share of JPEGs that the GPU's JPEG engine decodes (A100, H100 and later); nvJPEG's kernels decode "
        "the rest; the best value depends on the GPU and on data.threads",
    )
    prefetch: Count = Field(3, description="batches prepared ahead")
    max_bad_fraction: Probability = Field(
        0.01,
        description="share of bad samples above which training stops; in evaluation, of each split",
    )
    wait_s: NonNegative = Field(
        300.0, description="seconds to wait for a data folder that has disappeared; 0: stop at once"
    )
    max_pixels: Count = Field(178_956_970, description="refuse larger images as decompression bombs (Pillow)")
