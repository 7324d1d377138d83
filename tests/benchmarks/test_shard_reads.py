from __future__ import annotations

import pytest

from iwm_fast.benchmarks.shard_reads import measure


@pytest.mark.slow
def test_the_order_of_shards_takes_few_requests_and_hardly_more_bytes_than_images_have(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "set, and restored after")
    found = measure(tmp_path, 256, 0.0, 1)
    by_sample, by_shard = found["rows"][:2]
    assert by_sample["requests_per_image"] == 1
    assert by_shard["requests_per_image"] < 0.2
    assert 1 < by_shard["bytes_read_per_byte_used"] < 1.05
    assert (len(found["rows"]) == 3) != ("webdataset" in found["skipped"])
