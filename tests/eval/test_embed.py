"""Features in a file: whose they are, of which image, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from made_sources import example, write_records
from PIL import Image
from small_run import small_config
from store import moto_server, upload
from torch.testing import assert_close

import iwm_fast
from iwm_fast.data.image_list import list_images
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.engine import pretrain
from iwm_fast.eval import feature_files
from iwm_fast.eval.feature_files import METADATA_KEY, Rows, Table, feature_file
from iwm_fast.export.weights import export_run

# fp32 sums of a batch of another size are taken in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("embed") / "run"
    pretrain(small_config(tiny_images, train__steps=2), out)
    return out


def parquet(path):
    """(columns, metadata, row groups) of a file."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        table = file.read()
        return table.to_pydict(), json.loads(file.metadata.metadata[METADATA_KEY]), file.metadata.num_row_groups


def npz(path):
    with np.load(path, allow_pickle=False) as file:
        found = dict(file)
    return found, json.loads(str(found.pop("metadata")))


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize("source", ["run", "export"])
def test_features_are_the_encoders_mean_token_of_every_image_in_order(
    run, tiny_images, tmp_path, command, which, source
):
    place = run if source == "run" else export_run(run, tmp_path / "export")
    out = tmp_path / "deep" / "f.parquet"
    options = ["--encoder", which] if which == "context" else []
    assert command("embed", place, tiny_images, "--out", out, *options).returncode == 0
    columns, metadata, _ = parquet(out)
    files = sorted(tiny_images.rglob("*.jpg"))
    assert columns["key"] == [str(file.relative_to(tiny_images)) for file in files]
    assert columns["class"] == [file.parent.name for file in files]
    assert [metadata["classes"][label] for label in columns["label"]] == columns["class"]
    wanted = iwm_fast.load(place).encode(files, which).mean(1)
    assert_close(torch.tensor(columns["feature"]), wanted, **TOLERANCE)
    assert (metadata["encoder"], metadata["image_size"], metadata["shape"]) == (which, 32, [32])
    assert (metadata["images"], metadata["step"], metadata["left_out"]["count"]) == (24, 2, 0)
    assert metadata["configuration"]["model"]["patch"] == 8
    assert "torch" in metadata["environment"]["packages"]
    assert [path.name for path in out.parent.iterdir()] == ["f.parquet"]


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_both_formats_hold_the_same(run, tiny_images, tmp_path, command, pool):
    for name in ("f.parquet", "f.npz"):
        done = command(
            "embed", run, tiny_images, "--out", tmp_path / name, "--pool", pool, "--json", tmp_path / "j.json"
        )
        assert done.returncode == 0
    columns, told, _ = parquet(tmp_path / "f.parquet")
    arrays, also_told = npz(tmp_path / "f.npz")
    assert told == also_told
    assert arrays["feature"].dtype == np.float32
    assert arrays["feature"].shape == (24, *told["shape"]) == ((24, 32) if pool == "mean" else (24, 16, 32))
    assert_close(torch.from_numpy(arrays["feature"]), torch.tensor(columns["feature"]), rtol=0, atol=0)
    assert arrays["key"].tolist() == columns["key"]
    assert arrays["classes"][arrays["label"]].tolist() == columns["class"]
    answer = json.loads((tmp_path / "j.json").read_text())
    assert (answer["schema"], answer["images"], answer["pool"]) == ("iwm-fast-embed/1", 24, pool)


def require_same(run, tiny_images, path, classes=("cold", "warm")):
    arrays, _ = npz(path)
    wanted = iwm_fast.load(run).encode(sorted(tiny_images.rglob("*.jpg"))).mean(1)
    assert_close(torch.from_numpy(arrays["feature"]), wanted, **TOLERANCE)
    assert arrays["classes"][arrays["label"]].tolist() == [classes[0]] * 12 + [classes[1]] * 12


@pytest.mark.parametrize("kind", ["shards", "manifest", "tfrecord"])
def test_other_sources_give_the_same_features(run, tiny_images, tmp_path, command, kind):
    place = tmp_path / "packed"
    if kind == "shards":
        write_shards(tiny_images, place, shard_bytes=20_000)
    elif kind == "tfrecord":
        place.mkdir()
        images = list_images(tiny_images)
        payloads = [example(images.read(i), int(images.labels[i])) for i in range(len(images))]
        write_records(place / "a.tfrecord", payloads)
    else:
        place = tmp_path / "m.tsv"
        write_index(tiny_images, place)
    assert command("embed", run, place, "--out", tmp_path / "f.npz").returncode == 0
    require_same(run, tiny_images, tmp_path / "f.npz", ("0", "1") if kind == "tfrecord" else ("cold", "warm"))


@pytest.mark.slow
def test_an_object_store_gives_the_same_features(run, tiny_images, tmp_path, command, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with moto_server() as port:
        url = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        upload(url, tiny_images, "bucket", "photos/")
        assert command("embed", run, "s3://bucket/photos", "--out", tmp_path / "f.npz").returncode == 0
    require_same(run, tiny_images, tmp_path / "f.npz")


def test_after_ctrl_c_there_is_no_file(run, tiny_images, tmp_path, command, monkeypatch):
    def interrupted(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_files._Parquet, "add", interrupted)
    assert command("embed", run, tiny_images, "--out", tmp_path / "f.parquet").returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_folders_of_splits_are_a_column_and_classes_lie_below_them(run, tiny_images, tmp_path, command):
    for part in ("train", "val"):
        shutil.copytree(tiny_images, tmp_path / "set" / part)
    shutil.copy(tiny_images / "cold" / "000.jpg", tmp_path / "set" / "beside.jpg")
    assert command("embed", run, tmp_path / "set", "--out", tmp_path / "f.parquet").returncode == 0
    columns, metadata, _ = parquet(tmp_path / "f.parquet")
    assert metadata["classes"] == ["cold", "warm"]
    rows = list(zip(columns["key"], columns["split"], columns["class"], columns["label"], strict=True))
    assert rows[0] == ("beside.jpg", None, None, None)
    assert rows[1] == ("train/cold/000.jpg", "train", "cold", 0)
    assert rows[-1] == ("val/warm/011.jpg", "val", "warm", 1)
    assert command("embed", run, tmp_path / "set", "--out", tmp_path / "f.npz").returncode == 0
    arrays, _ = npz(tmp_path / "f.npz")
    assert (arrays["split"][0], arrays["label"][0]) == ("", -1)


def test_images_without_classes_have_no_label(run, tiny_images, tmp_path, command):
    assert command("embed", run, tiny_images / "cold", "--out", tmp_path / "f.parquet").returncode == 0
    columns, metadata, _ = parquet(tmp_path / "f.parquet")
    assert (sorted(columns), metadata["classes"]) == (["feature", "key"], [])


def test_a_broken_image_is_left_out_aloud_within_the_limit(run, tiny_images, tmp_path, command):
    shutil.copytree(tiny_images, tmp_path / "set")
    broken = tmp_path / "set" / "cold" / "005.jpg"
    broken.write_bytes(b"torn")
    words = ("embed", run, tmp_path / "set", "--out", tmp_path / "f.parquet")
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        f"iwm-fast: {tmp_path / 'set'}: 1 of 24 images cannot be used, more than data.max_bad_fraction" in done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    done = command(*words, "data.max_bad_fraction=0.1")
    assert done.returncode == 0
    assert f"1 of 24 images left out: {broken} (" in done.stdout
    columns, metadata, _ = parquet(tmp_path / "f.parquet")
    assert len(columns["key"]) == metadata["images"] == 23
    assert "cold/005.jpg" not in columns["key"]
    assert metadata["left_out"]["files"] == [{"file": str(broken), "reason": "cannot identify image file"}]
    wanted = iwm_fast.load(run).encode(tmp_path / "set" / columns["key"][5]).mean(1)[0]
    assert_close(torch.tensor(columns["feature"][5]), wanted, **TOLERANCE)


def test_parquet_is_written_in_row_groups_as_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "_GROUP_BYTES", 4 * 4 * 3)
    values = np.arange(44, dtype=np.float32).reshape(11, 4)
    with (tmp_path / "f.parquet").open("wb") as file, feature_file(".parquet", file, Table(11, (4,))) as writer:
        for first in range(0, 11, 2):
            part = values[first : first + 2]
            writer.add(Rows([str(first + i) for i in range(len(part))], part))
            if first == 4:
                assert file.tell() > 4  # the first group is in the file, not in memory
        writer.finish("{}")
    columns, _, groups = parquet(tmp_path / "f.parquet")
    assert columns["feature"] == values.tolist()
    assert groups >= 3


def test_an_npz_larger_than_memory_is_refused_before_any_image_is_read(tmp_path):
    with (
        (tmp_path / "f.npz").open("wb") as file,
        pytest.raises(iwm_fast.errors.UserError, match=r"in memory .* give a file that ends in \.parquet"),
        feature_file(".npz", file, Table(10**12, (768,))),
    ):
        pass


def test_names_that_are_no_utf8_are_kept_as_text(run, tmp_path, command):
    folder = tmp_path / "set"
    folder.mkdir()
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    Image.new("RGB", (32, 32), (200, 10, 10)).save(tmp_path / "a.png")
    shutil.move(tmp_path / "a.png", folder / name)
    for end, read in (("parquet", lambda path: parquet(path)[0]), ("npz", lambda path: npz(path)[0])):
        assert command("embed", run, folder, "--out", tmp_path / f"f.{end}").returncode == 0
        assert list(read(tmp_path / f"f.{end}")["key"]) == ["caf\\udce9.png"]


def refused(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("iwm-fast: ")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done.stderr
    return lines[0].removeprefix("iwm-fast: ")


def test_mistakes_are_one_line_each(run, tiny_images, tmp_path, command):
    there, masks = tmp_path / "there.npz", tmp_path / "masks"
    there.write_text("mine")
    for part in ("images", "masks"):
        shutil.copytree(tiny_images / "cold", masks / part)
    out = tmp_path / "f.npz"
    for words, line in (
        ((run, tiny_images, "--out", there), f"{there}: exists already; choose another --out"),
        (
            (run, tiny_images, "--out", tmp_path),
            f"--out {tmp_path}: unknown format; give a file that ends in .parquet or .npz",
        ),
        ((run, tiny_images, "--out", tmp_path / "f.csv"), f"--out {tmp_path / 'f.csv'}: unknown format; give a file"),
        (
            (run, tiny_images, "--out", out, "--encoder", "both"),
            "--encoder both: no such encoder; give target or context",
        ),
        ((run, tiny_images, "--out", out, "--pool", "max"), "--pool max: no such pooling; give one of mean, none"),
        ((run, tiny_images, "--out", out, "train.lr=1"), "command line: train.lr=1: embed can override data.source"),
        ((run, tmp_path / "nowhere", "--out", out), f"{tmp_path / 'nowhere'} "),
        ((run, masks, "--out", out), f"{masks} holds images/ and masks/"),
        ((tiny_images, tiny_images, "--out", out), f"{tiny_images}: not a run (no config.yaml)"),
        ((run, tiny_images, "--out", "/dev/full/f.npz"), "--out: /dev/full/f.npz: cannot be written: Not a directory"),
    ):
        assert refused(command("embed", *words)).startswith(line)
    assert there.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.npz", "masks"}


def test_parquet_without_pyarrow_says_what_to_install(run, tiny_images, tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    out = tmp_path / "f.parquet"
    line = refused(command("embed", run, tiny_images, "--out", out))
    assert line == (
        f"--out: {out}: Parquet is written by pyarrow: pip install 'iwm-fast[parquet]', "
        "or name a file that ends in .npz"
    )
    assert command("embed", run, tiny_images, "--out", tmp_path / "f.npz").returncode == 0


def test_a_file_that_appears_meanwhile_is_not_replaced(run, tiny_images, tmp_path, command, monkeypatch):
    out = tmp_path / "f.npz"
    finish = feature_files._Npz.finish

    def late(self, metadata):
        out.write_text("another's")
        finish(self, metadata)

    monkeypatch.setattr(feature_files._Npz, "finish", late)
    assert refused(command("embed", run, tiny_images, "--out", out)).startswith(
        f"{out}: cannot be written: File exists"
    )
    assert out.read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("end", ["parquet", "npz"])
def test_a_full_disk_is_one_line(run, tiny_images, tmp_path, command, end):
    out = tmp_path / f"f.{end}"
    out.symlink_to("/dev/full")
    line = refused(command("embed", run, tiny_images, "--out", out))
    assert line == f"{out}: cannot be written: No space left on device; choose another --out, or free space there"
