"""Whole trainings over the contents of real data sets, with the same result for every file from verify and training."""

from __future__ import annotations

import json
import shutil
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import reference_views as reference
from made_images import broken_tables, encode, picture, turned
from made_sources import example, write_records
from PIL import Image, ImageOps
from small_run import TINY_WORDS, small_config

from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import Views
from iwm_fast.data import samples as samples_module
from iwm_fast.data.decode.encoded import BadSample, decode_upright, inspect
from iwm_fast.data.eval_images import centred_square, load_clean
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.data.tools.verify import verify
from iwm_fast.data.views.graph import ViewGraph
from iwm_fast.engine import pretrain
from iwm_fast.errors import UserError

VARIETY = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "variety"
LIMIT = 178_956_970
PLAIN = encode(picture(40, 30))


def png_chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb():
    """Return a PNG of 300 bytes that claims 400 megapixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND")


IMAGE = Image.fromarray(picture(40, 30))
GOOD = {
    "plain.jpg": PLAIN,
    "progressive.jpg": encode(IMAGE, progressive=True),
    "jpeg under another name.png": PLAIN,
    "cmyk.jpg": encode(IMAGE.convert("CMYK")),
    "gray.jpg": encode(IMAGE.convert("L")),
    "gray 16 bits.png": encode(Image.fromarray(np.asarray(IMAGE.convert("L")).astype(np.uint16) * 257), "PNG"),
    "palette.png": encode(IMAGE.quantize(16), "PNG"),
    "palette transparent.png": encode(IMAGE.quantize(16), "PNG", transparency=3),
    "alpha.png": encode(IMAGE.convert("RGBA"), "PNG"),
    "gray alpha.png": encode(IMAGE.convert("LA"), "PNG"),
    "black and white.png": encode(IMAGE.convert("1"), "PNG"),
    "alpha.webp": encode(IMAGE.convert("RGBA"), "WEBP"),
    "tall.png": encode(picture(1, 200), "PNG"),
    "trailing bytes.jpg": PLAIN + b"\0\0\0",
    "big5.tiff": encode(IMAGE, "TIFF"),
    "gif.jpg": encode(IMAGE, "GIF"),
    **{f"turned {o}.jpg": turned(picture(40, 30), o) for o in range(1, 9)},
    **{f"turned {o}.webp": turned(picture(40, 30), o, "WEBP") for o in (3, 6)},
}
BAD = {
    "zero bytes.jpg": b"",
    "text.jpg": b"this is text",
    "zeros.png": bytes(4000),
    "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
    "half.jpg": PLAIN[: len(PLAIN) // 2],
    "nearly whole.jpg": PLAIN[:-40],
    "header only.jpg": PLAIN[:200],
    "half.png": encode(IMAGE, "PNG")[:900],
    "half.webp": encode(picture(90, 80), "WEBP")[:700],
    "bomb.png": bomb(),
    "broken tables.jpg": broken_tables(PLAIN),
    "marker within.jpg": PLAIN[: len(PLAIN) // 2] + b"\xff\xc4" + PLAIN[len(PLAIN) // 2 + 2 :],
}


def write(root, files):
    root.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (root / name).write_bytes(raw)
    return root


def bad_names(found):
    return sorted(entry["file"].rsplit("/", 1)[-1] for entry in found["bad"])


def test_the_good_are_pillows_upright_rgb_and_the_bad_are_named_with_a_reason(tmp_path):
    root = write(tmp_path / "all", GOOD | BAD)
    found = verify(root, device="cpu", threads=1)
    assert bad_names(found) == sorted(BAD)
    assert (found["files"], found["decoded"]) == (len(GOOD | BAD), len(GOOD))
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in found["bad"])
    images = list_images(root)
    for batch in load_clean(images, 24, device="cpu", threads=1):
        for row, shown in zip(batch.rows.tolist(), batch.images.numpy(), strict=True):
            upright = np.asarray(_upright(Path(images.name(row))))
            height, width = upright.shape[:2]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            expected = reference.resize(upright[top : top + side, left : left + side], 24)
            # the reference resizes in float64 and DALI rounds twice; decoding is the same library's
            assert reference.error(expected, shown) <= 1.0, images.name(row)


def _upright(path):
    """Return Pillow's result without our code, but the high byte of 16 bits, which Pillow would clip to white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "I;16":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")


def test_verify_says_the_same_of_every_kind_of_source(tmp_path):
    root = write(tmp_path / "all", GOOD | BAD)
    images = list_images(root)
    names = [Path(images.name(i)).name for i in range(len(images))]
    payloads = [example((root / name).read_bytes(), 1) for name in names]
    offsets = write_records(tmp_path / "all.tfrecord", payloads)
    by_offset = dict(zip(map(str, offsets), names, strict=True))
    found = verify(tmp_path / "all.tfrecord", device="cpu", threads=1)
    assert sorted(by_offset[entry["file"].rsplit(":", 1)[1]] for entry in found["bad"]) == sorted(BAD)
    write_shards(root, tmp_path / "shards")
    packed = list_images(tmp_path / "shards")
    of_member = {packed.name(i): name for i, name in enumerate(names)}
    found = verify(tmp_path / "shards", device="cpu", threads=1)
    assert sorted(of_member[entry["file"]] for entry in found["bad"]) == sorted(BAD)


def test_damaged_files_get_pillows_verdict_from_the_pipeline():
    """Differential: cut, spliced, flipped and marker-ridden files; the pipeline refuses exactly what Pillow refuses.

    Without the check for markers within a scan, one in seven of the damaged files differed.
    """
    rng = np.random.default_rng(5)
    bases = [
        PLAIN,
        encode(picture(64, 50), progressive=True),
        encode(picture(64, 50), restart_marker_blocks=4),
        encode(picture(30, 20), "PNG"),
    ]
    graph = ViewGraph(16, 1, "cpu", 1, geometric=False, max_pixels=10**7)
    verdicts = []
    for number in range(240):
        raw = _damaged(rng, bases[number % 4], number // 4 % 5)
        verdicts.append((_pillow_decodes(raw), _pipeline_decodes(graph, raw)))
    assert all(pillow == pipeline for pillow, pipeline in verdicts)
    assert 40 < sum(pillow for pillow, _ in verdicts) < 200


def _damaged(rng, raw, kind):
    at = int(rng.integers(2, len(raw)))
    if kind == 0:
        return raw[:at] + bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + raw[-2:]
    if kind == 2:
        return raw[:at] + raw[at + int(rng.integers(1, 200)) :]
    new = rng.bytes(64) if kind == 3 else bytes([0xFF, int(rng.integers(0xC0, 0xFF))])
    return raw[:at] + new + raw[at + len(new) :]


def _pillow_decodes(raw):
    try:
        decode_upright(raw, 10**7)
    except BadSample:
        return False
    return True


def _pipeline_decodes(graph, raw):
    try:
        encoded = inspect(raw, 10**7)
        size = np.array([(encoded.width, encoded.height)], np.int64)
        graph.run([encoded], Views.neutral(size, centred_square(size)))
    except BadSample:  # BadRows too
        return False
    return True


def mixed(root, count, share):
    """Write `count` files, one in 1 / share of which is bad; return the names of the bad ones."""
    root.mkdir()
    bad = []
    for number in range(count):
        good = encode(picture(40 + number % 7, 30 + number % 5, number))
        name = f"{number:03d}.jpg"
        if number % round(1 / share) == 3:
            kind = list(BAD)[number // round(1 / share) % len(BAD)]
            name = f"{number:03d} {kind}"
            good = BAD[kind]
            bad.append(name)
        (root / name).write_bytes(good)
    return bad


TINY = (*TINY_WORDS, "train.global_batch=20")


def listed(run_dir):
    return [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]


def test_a_training_over_five_percent_of_broken_files_finishes_and_lists_exactly_those(tmp_path, command):
    bad = mixed(tmp_path / "images", 240, 0.05)
    assert len(bad) == 12 == len(BAD)
    words = (*TINY, f"data.root={tmp_path / 'images'}", "train.epochs=1.0", "data.max_bad_fraction=0.1")
    done = command("pretrain", *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    entries = listed(tmp_path / "run")
    assert sorted(entry["file"] for entry in entries) == sorted(str(tmp_path / "images" / name) for name in bad)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    for entry in entries:
        assert list(entry) == ["file", "reason", "epoch", "sample_id"]
        assert names[entry["sample_id"]] == Path(entry["file"]).name
        assert entry["epoch"] == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bad_samples"] == 12
    verdict = verify(tmp_path / "images", device="cpu", threads=1)
    assert {entry["file"]: entry["reason"] for entry in verdict["bad"]} == {e["file"]: e["reason"] for e in entries}


def test_over_the_limit_the_run_stops_with_ten_named(tmp_path, command):
    bad = mixed(tmp_path / "images", 240, 0.2)
    words = (*TINY, f"data.root={tmp_path / 'images'}", "train.epochs=1.0", "data.max_bad_fraction=0.05")
    done = command("pretrain", *words, "--out", tmp_path / "run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith(
        "iwm-fast: 13 of 240 files cannot be decoded, more than data.max_bad_fraction (0.05) allows: "
    )
    assert sum(f"/{name} (" in line for name in bad) == 10
    assert "; and 3 more. " in line
    assert "Traceback" not in done.stderr


class _Vanishing:
    """Removes something when the n-th file is read."""

    def __init__(self, monkeypatch, at, act):
        self.left, self.act = at, act
        self.read = samples_module.FileStore._read
        step = self._step

        def read(store, file):
            return step(store, file)

        monkeypatch.setattr(samples_module.FileStore, "_read", read)
        monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)

    def _step(self, store, file):
        self.left -= 1
        if self.left == 0:
            self.act()
        return self.read(store, file)


def test_files_that_vanish_while_training_are_replaced_and_listed(tmp_path, monkeypatch):
    root = write(tmp_path / "images", {f"{n:02d}.jpg": encode(picture(40, 30, n)) for n in range(40)})

    def vanish():
        (root / "01.jpg").unlink()
        (root / "02.jpg").unlink()
        (root / "03.jpg").write_bytes(b"")

    _Vanishing(monkeypatch, 50, vanish)
    pretrain(small_config(root, train__schedule_steps=15, data__max_bad_fraction=0.2), tmp_path / "run")
    assert {Path(entry["file"]).name: entry["reason"] for entry in listed(tmp_path / "run")} == {
        "01.jpg": "cannot be read: No such file or directory",
        "02.jpg": "cannot be read: No such file or directory",
        "03.jpg": "the file is empty",
    }


@pytest.mark.parametrize(
    "indexed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["shards", "a manifest of shards"]
)
def test_a_shard_that_disappears_while_training_is_named_once_and_no_sample_counted_twice(
    tmp_path, monkeypatch, capfd, indexed
):
    root = write(tmp_path / "images", {f"{n:02d}.jpg": encode(picture(40, 30, n)) for n in range(40)})
    write_shards(root, tmp_path / "shards", shard_bytes=12_000)
    if indexed:
        write_index(tmp_path / "shards")
    images = list_images(tmp_path / "shards")
    (lost,) = [name for name in images.source.shards() if name.endswith("1.tar")]
    inside = [images.name(row) for row in range(40) if images.source_name(row).startswith(lost)]
    assert 1 < len(inside) < 20
    _Vanishing(monkeypatch, 50, (tmp_path / "shards" / lost).unlink)
    config = small_config(tmp_path / "shards", train__schedule_steps=15, data__max_bad_fraction=0.6)
    pretrain(config, tmp_path / "run")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith(str(tmp_path / "shards" / lost))]
    assert len(said) == 1
    assert "is gone; each of its samples counts as bad" in said[0]
    names = [entry["file"] for entry in listed(tmp_path / "run")]
    assert sorted(names) == sorted(inside)


@pytest.mark.slow
def test_a_run_names_the_shards_that_changed_since_its_checkpoint(tmp_path, capfd):
    root = write(tmp_path / "images", {f"{n:02d}.jpg": encode(picture(40, 30, n)) for n in range(40)})
    write_shards(root, tmp_path / "shards", shard_bytes=12_000)
    limit = {"train__schedule_steps": 4}
    pretrain(small_config(tmp_path / "shards", train__steps=2, **limit), tmp_path / "run")
    before = list_images(tmp_path / "shards").source.shards()
    first, second = list(before)[:2]
    for path in (tmp_path / "shards").glob(f"{second.removesuffix('.tar')}.*"):
        path.rename(path.with_name(f"new{path.suffix}"))
    for path in (tmp_path / "shards").glob(f"{first.removesuffix('.tar')}.*"):
        path.unlink()
    capfd.readouterr()
    pretrain(small_config(tmp_path / "shards", train__steps=3, **limit), tmp_path / "run", resume="auto")
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "images now and had" in line]
    left = 40 - before[first]
    assert f"the data have {left} images now and had 40 when the checkpoint was written: the remaining" in said
    assert "so in this epoch some come twice and some not" in said
    assert f"2 shards gone ({first}, {second}); 1 shard new (new.tar)" in said


@pytest.mark.parametrize("wait_s", [0.0, 0.5])
def test_a_folder_that_goes_away_while_training_is_one_clear_error(tmp_path, monkeypatch, wait_s):
    root = write(tmp_path / "images", {f"{n:02d}.jpg": encode(picture(40, 30, n)) for n in range(40)})
    _Vanishing(monkeypatch, 30, lambda: shutil.move(root, tmp_path / "elsewhere"))
    config = small_config(root, train__schedule_steps=15, data__max_bad_fraction=1.0, data__wait_s=wait_s)
    with pytest.raises(UserError, match="bring the data back, and start again") as caught:
        pretrain(config, tmp_path / "run")
    assert str(caught.value).startswith(f"{root}: the data folder is gone (No such file or directory)")
    assert ("within 0.5 s" in str(caught.value)) == bool(wait_s)
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_a_folder_that_comes_back_is_waited_for(tmp_path, monkeypatch, capfd):
    root = write(tmp_path / "images", {f"{n:02d}.jpg": encode(picture(40, 30, n)) for n in range(40)})
    away = tmp_path / "elsewhere"
    back = threading.Timer(1.0, lambda: away.rename(root))

    def leave():
        root.rename(away)
        back.start()

    _Vanishing(monkeypatch, 30, leave)
    pretrain(small_config(root, train__schedule_steps=15, data__wait_s=60.0), tmp_path / "run")
    back.join()
    assert capfd.readouterr().err.count("is gone (No such file or directory); waiting up to 60 s") == 1
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_closing_a_stream_ends_its_wait(tmp_path):
    root = write(tmp_path / "images", {f"{n:02d}.jpg": encode(picture(40, 30, n)) for n in range(9)})
    images = list_images(root)
    shutil.rmtree(root)
    config = small_config(root, data__wait_s=300.0)
    stream = TrainingStream(config, images, ActionSpace(config.actions.groups))
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 60


def test_a_resumed_run_says_that_the_list_of_images_changed_and_a_manifest_keeps_it(tmp_path, capfd):
    root = write(tmp_path / "images", {f"{n:02d}.jpg": encode(picture(40, 30, n)) for n in range(24)})
    write_index(root, tmp_path / "list.tsv")
    limit = {"train__schedule_steps": 4, "data__max_bad_fraction": 0.2}
    for place in (root, tmp_path / "list.tsv"):
        pretrain(small_config(place, train__steps=2, **limit), tmp_path / f"run of {place.name}")
    (root / "07.jpg").unlink()
    pretrain(small_config(root, **limit), tmp_path / "run of images", resume="auto")
    assert "the data have 23 images now and had 24 when the checkpoint was written" in capfd.readouterr().err
    pretrain(small_config(tmp_path / "list.tsv", **limit), tmp_path / "run of list.tsv", resume="auto")
    assert "images now and had" not in capfd.readouterr().err


@pytest.mark.skipif(not VARIETY.is_dir(), reason="the folder of awkward files is not at hand")
def test_every_awkward_file_is_treated_as_its_manifest_says(tmp_path):
    lines = (VARIETY / "MANIFEST.tsv").read_text().splitlines()[1:]
    expected = {line.split("\t")[0]: line.split("\t")[2] for line in lines}
    verdict = verify(VARIETY, device="cpu", threads=1)
    assert verdict["files"] == len(expected)
    bad = set(bad_names(verdict))
    assert {n for n, said in expected.items() if said == "rejects"} <= bad
    assert not bad & {n for n, said in expected.items() if said == "decodes"}
    config = small_config(VARIETY, train__schedule_steps=8, train__global_batch=7, data__max_bad_fraction=1.0)
    pretrain(config, tmp_path / "run")
    assert {Path(entry["file"]).name: entry["reason"] for entry in listed(tmp_path / "run")} == {
        Path(entry["file"]).name: entry["reason"] for entry in verdict["bad"]
    }


@pytest.mark.skipif(not VARIETY.is_dir(), reason="the folder of awkward files is not at hand")
def test_the_pixels_of_awkward_files_are_pillows_upright_rgb():
    images = list_images(VARIETY)
    checked = 0
    for batch in load_clean(images, 32, device="cpu", threads=1):
        for row, shown in zip(batch.rows.tolist(), batch.images.numpy(), strict=True):
            upright = decode_upright(images.read(row), LIMIT)
            height, width = upright.shape[:2]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            expected = reference.resize(upright[top : top + side, left : left + side], 32)
            assert reference.error(expected, shown) <= 1.5, images.name(row)
            checked += 1
    assert checked >= 40
