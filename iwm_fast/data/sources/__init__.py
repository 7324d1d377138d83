"""Sources of images: a folder, WebDataset shards, TFRecord files, a manifest; on disk or in an S3-compatible
object store.
"""

from iwm_fast.data.sources.base import Labels, Source
from iwm_fast.data.sources.opening import open_source, top_level
from iwm_fast.data.sources.own import register_source
from iwm_fast.data.sources.s3 import PATIENCE, Patience
from iwm_fast.data.sources.storage import DataGone, Storage

__all__ = [
    "PATIENCE",
    "DataGone",
    "Labels",
    "Patience",
    "Source",
    "Storage",
    "open_source",
    "register_source",
    "top_level",
]
