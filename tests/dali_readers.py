"""DALI's own readers of shards and TFRecord files, as the independent reference of ours."""

from __future__ import annotations

from nvidia.dali import fn, pipeline_def
from nvidia.dali import tfrecord as tfrec


def dali_shards(shards, indexes, extensions):
    """Return [(image, label)] from DALI's webdataset reader."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read():
        return tuple(fn.readers.webdataset(paths=shards, index_paths=indexes, ext=extensions, dont_use_mmap=True))

    return _all(read())


def dali_records(files, indexes):
    """Return [(image, label)] from DALI's TFRecord reader."""
    features = {
        "image/encoded": tfrec.FixedLenFeature((), tfrec.string, ""),
        "image/class/label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
    }

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read():
        out = fn.readers.tfrecord(path=files, index_path=indexes, features=features)
        return out["image/encoded"], out["image/class/label"]

    return _all(read())


def _all(pipeline):
    pipeline.build()
    count = next(iter(pipeline.reader_meta().values()))["epoch_size"]
    rows = []
    for _ in range(count):
        image, label = pipeline.run()
        rows.append((image.at(0).tobytes(), label.at(0)))
    return rows
