"""Measure how images reach a host from shards in an object store: requests, bytes and images per second.

    python -m benchmarks.shard_reads --json FILE [--images 2048] [--latency 0.02]

A server on the loopback, in a process of its own, answers the requests of an S3 client and of curl after --latency
seconds each, and counts requests and bytes. The readers take batches of encoded images from 16 shards, without decoding
them: iwm-fast in both orders (`data.order`), which also checks each image's structure, and the webdataset library's own
loader where it is installed. Nothing is cached by a reader.

The first epoch is not counted, so that what is read ahead of the counted ones is as much as what is read ahead of
their end. Every epoch of every reader has to have each image once. Each reader runs once to count, waiting at both ends
until nothing is on its way. Then they run in turn, --repeats times, to be timed without such waits; rates are medians.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import importlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from iwm_fast.config import Config, DataConfig, TrainConfig
from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.image_list import ImageSet, list_images
from iwm_fast.data.samples import FileStore, SampleReader
from iwm_fast.data.shard_order import ShardOrder, order_of_samples
from iwm_fast.data.shard_reads import ReadPlan
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.environment import installed_version
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

SHARDS, WINDOW, BATCH, EPOCHS = 16, 64, 64, 3
BUCKET = "pictures"


class Handler(BaseHTTPRequestHandler):
    """Lists the bucket as S3 does, sends objects and ranges of them, and counts."""

    protocol_version = "HTTP/1.1"
    root: Path
    latency_s: float
    requests = sent = 0

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """A list, an object, or the counts."""
        url = urlsplit(self.path)
        if url.path == "/counts":
            self._send(200, json.dumps([Handler.requests, Handler.sent]).encode())
            return
        time.sleep(self.latency_s)
        name = unquote(url.path).removeprefix(f"/{BUCKET}").strip("/")
        if not name:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            files = [path for path in sorted(self.root.iterdir()) if path.name.startswith(prefix)]
            entries = "".join(
                f"<Contents><Key>{escape(path.name)}</Key><Size>{path.stat().st_size}</Size></Contents>"
                for path in files
            )
            self._send(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode())
            return
        with (self.root / name).open("rb") as file:
            size, asked = os.fstat(file.fileno()).st_size, self.headers.get("Range", "")
            first, last = asked.removeprefix("bytes=").split("-") if asked else ("0", "")
            end = min(int(last or size - 1), size - 1)
            file.seek(int(first))
            data = file.read(end + 1 - int(first))
        Handler.requests, Handler.sent = Handler.requests + 1, Handler.sent + len(data)
        self._send(206 if asked else 200, data)

    def do_HEAD(self) -> None:
        """The size of an object."""
        time.sleep(self.latency_s)
        size = (self.root / unquote(urlsplit(self.path).path).rsplit("/", 1)[1]).stat().st_size
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(root: Path, latency_s: float, port: Connection) -> None:
    """Serve until killed."""
    Handler.root, Handler.latency_s = root, latency_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port.send(server.server_address[1])
    server.serve_forever()


def counts(port: int) -> tuple[int, int]:
    """Requests for objects, and their bytes, until now."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/counts")
    requests, sent = json.loads(connection.getresponse().read())
    connection.close()
    return requests, sent


def write_images(folder: Path, count: int) -> int:
    """Write JPEGs of 500 × 375 with noise, of about 80 KB, 64 different ones; return the bytes of all."""
    random, made = np.random.default_rng(0), []
    for _ in range(64):
        smooth = np.kron(random.integers(30, 220, (15, 20, 3)), np.ones((25, 25, 1)))
        buffer = io.BytesIO()
        noisy = np.clip(smooth + random.normal(0, 14, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(buffer, "JPEG", quality=88)
        made.append(buffer.getvalue())
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(made[number % 64])
    return sum(len(made[number % 64]) for number in range(count))


def ours(order: str, url: str, images: ImageSet) -> Iterator[list[Any]]:
    """Batches of iwm-fast, as the ids of their images."""
    data = DataConfig(root=url, order=order, streams=SHARDS, shuffle_window=WINDOW)  # type: ignore[arg-type]
    config = Config(data=data, train=TrainConfig(global_batch=BATCH))
    made = order_of_samples(config, images, 1, "feistel")
    plan = ReadPlan(made) if isinstance(made, ShardOrder) else None
    store = FileStore(images, data.max_pixels, keep=False, plan=plan)
    reader = SampleReader(store, 0, BadSamples(len(images), 0.0))
    try:
        for start in range(0, EPOCHS * len(images), BATCH):
            yield reader.read(*made(start, start + BATCH)).files.tolist()
    finally:
        store.close()


def webdataset(urls: list[str]) -> Iterator[list[Any]]:
    """Batches of the library's own loader, in this process, as the keys of their images."""
    library = importlib.import_module("webdataset")
    for _ in range(EPOCHS):
        loader = library.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHARDS * WINDOW)
        batch: list[Any] = []
        for sample in loader:
            assert sample["jpg"]
            batch.append(sample["__key__"])
            if len(batch) == BATCH:
                yield batch
                batch = []


def settled(port: int) -> tuple[int, int]:
    """The counts, when nothing is read any more."""
    now, before = counts(port), None
    while now != before:
        time.sleep(0.5)
        now, before = counts(port), now
    return now


def run(
    reader: Iterator[list[Any]], images: int, *, begin: Callable[[], Any], end: Callable[[], Any]
) -> tuple[Any, Any]:
    """Read all epochs. Return what `begin` gives after the first and `end` after the last."""
    per_epoch = images // BATCH
    for epoch in range(EPOCHS):
        if epoch == 1:
            before = begin()
        seen = [image for _ in range(per_epoch) for image in next(reader)]
        if len(set(seen)) != images:
            raise RuntimeError(f"an epoch has {len(set(seen))} images of {images}; nothing was measured")
    after = end()
    if hasattr(reader, "close"):
        reader.close()
    return before, after


def counted(reader: Iterator[list[Any]], images: int, used: int, port: int) -> dict[str, float]:
    """Requests per image, and bytes read per byte used."""
    now = functools.partial(settled, port)
    before, after = run(reader, images, begin=now, end=now)
    requests, sent = (one - other for one, other in zip(after, before, strict=True))
    return {
        "requests_per_image": requests / images / (EPOCHS - 1),
        "bytes_read_per_byte_used": sent / used / (EPOCHS - 1),
    }


def rate(reader: Iterator[list[Any]], images: int) -> float:
    """Images per second."""
    began, ended = run(reader, images, begin=time.perf_counter, end=time.perf_counter)
    return float((EPOCHS - 1) * images / (ended - began))


def measure(folder: Path, images: int, latency_s: float, repeats: int) -> dict[str, Any]:
    """Write the data, serve them, and let the readers read in turn."""
    (folder / "images").mkdir()
    used = write_images(folder / "images", images)
    write_shards(folder / "images", folder / "shards", shard_bytes=used // SHARDS + 600 * images // SHARDS)
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(folder / "shards", latency_s, theirs))
    server.start()
    try:
        port = mine.recv()
        os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        url = f"s3://{BUCKET}"
        listed = list_images(url)
        shards = sorted(path.name for path in (folder / "shards").glob("*.tar"))
        if len(shards) < SHARDS:
            raise RuntimeError(f"{len(shards)} shards were written, {SHARDS} are needed")
        urls = [f"http://127.0.0.1:{port}/{BUCKET}/{name}" for name in shards]
        readers: dict[str, Callable[[], Iterator[list[Any]]]] = {
            f"iwm-fast, data.order {order}": functools.partial(ours, order, url, listed)
            for order in ("sample", "shard")
        }
        skipped = {}
        if installed_version("webdataset") is None:
            skipped["webdataset"] = "the library is not installed: pip install webdataset"
        else:
            readers["webdataset"] = functools.partial(webdataset, urls)
        sums = {name: counted(make(), images, used, port) for name, make in readers.items()}
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, make in readers.items():
                rates[name].append(rate(make(), images))
    finally:
        server.kill()
        server.join()
    return {
        "images": images,
        "shards": len(shards),
        "bytes_per_image": used / images,
        "latency_s": latency_s,
        "streams": SHARDS,
        "shuffle_window": WINDOW,
        "versions": {"webdataset": installed_version("webdataset")},
        "load": os.getloadavg(),
        "rows": [
            {"reader": name, **sums[name], "images_per_s": median(found), "images_per_s_each": found}
            for name, found in rates.items()
        ],
        "skipped": skipped,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="in the data set, a multiple of 64")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", required=True, metavar="FILE")
    given = parser.parse_args()
    require_result(given.json)
    if given.images < SHARDS or given.images % BATCH:
        parser.error(f"--images must be a multiple of {BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        document = measure(Path(folder), given.images, given.latency, given.repeats)
    for row in document["rows"]:
        print(
            f"{row['reader']}: {row['requests_per_image']:.3f} requests per image, "
            f"{row['bytes_read_per_byte_used']:.3f} bytes read per byte used, {row['images_per_s']:.0f} images/s"
        )
    for name, reason in document["skipped"].items():
        print(f"{name}: skipped: {reason}")
    write_result(given.json, "shard-reads", document)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.shard_reads", main))
