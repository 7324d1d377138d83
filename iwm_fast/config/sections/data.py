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

__all__ = ["DataConfig"]


class DataConfig(Section):
    """Where images come from and how they are decoded."""

    source: Literal["auto", "folder", "webdataset", "tfrecord", "triplets"] = Field(
        "auto", description="auto: chosen by what lies under root, which the training says"
    )
    root: Place | None = Field(
        None,
        description="folder of images (sub-folders are classes), of .tar shards or of TFRecord files, the same as "
        "s3://bucket/prefix, or a manifest of iwm-fast data index; or a manifest of triplets (docs/guides/triplets.md)",
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="where DALI decodes and augments")
    threads: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="DALI's CPU threads; default: cores divided by the ranks of this host"
    )
    readers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="files read at a time by a rank; default: 1 from disk, 16 from a store"
    )
    checkers: Annotated[int, Field(ge=0, le=64)] | None = Field(
        None,
        description="processes of a rank that check images for damage ahead of their first use, of files on disk; 0: "
        "the thread that reads them does; default: on a GPU an eighth of the rank's cores, 2 at most, on a CPU 0. None "
        "are started for a set with under 2,000 unchecked images (iwm-fast data index --check checks them beforehand)",
    )
    store_timeout: Annotated[float, Field(ge=0.1, le=600)] = Field(
        20.0, description="seconds without a byte from a store (s3://) after which a request is made again"
    )
    store_attempts: Count = Field(6, description="times that a request to a store is made before the run stops")
    hw_decoder_load: Probability = Field(
        0.65,
        description="on a GPU with a JPEG engine (A100, H100 and later), the share of JPEGs given to it, the rest to "
        "nvJPEG's kernels; the best value depends on the GPU and on data.threads",
    )
    prefetch: Count = Field(3, description="batches prepared ahead")
    max_bad_fraction: Probability = Field(
        0.01,
        description="share of samples that may fail before the run stops, in training; of each split, in evaluation",
    )
    wait_s: NonNegative = Field(
        300.0, description="seconds to wait for a data folder that is gone to come back; 0: the run stops at once"
    )
    max_pixels: Count = Field(178_956_970, description="larger images are refused as decompression bombs (Pillow)")
