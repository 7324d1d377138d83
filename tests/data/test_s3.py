from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys

import pytest
from dali_readers import dali_shards
from made_images import encode, picture
from made_sources import example, write_classes, write_records, write_tar
from small_run import TINY_WORDS, small_config
from store import FaultyStore, moto_server, upload

from iwm_fast.actions.space import ActionSpace
from iwm_fast.data import samples
from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.identity import difference, identity_of
from iwm_fast.data.image_list import divide, list_images, split
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.sources import Patience
from iwm_fast.data.sources.left_out import SKIPPED
from iwm_fast.data.sources.opening import SYSTEM
from iwm_fast.data.sources.s3 import S3Storage
from iwm_fast.data.tools import index as index_module
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.data.tools.verify import verify
from iwm_fast.errors import UserError
from iwm_fast.eval.splits import open_splits

SECRET = "sEcReT/that+nobody-may-see/0123456789"
KEY = "AKIDTHATISNOTSECRET0"
SHORT = Patience(timeout_s=0.5, attempts=3)


@pytest.fixture(scope="module")
def moto():
    with moto_server() as port:
        yield port


@pytest.fixture
def store(moto, monkeypatch):
    found = FaultyStore(moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield found
    found.close()


@pytest.fixture
def folder(tmp_path):
    write_classes(tmp_path / "images", 13)
    return tmp_path / "images"


def contents(images):
    return [images.read(i) for i in range(len(images))]


def packed(kind, folder, out):
    if kind == "folder":
        return folder
    if kind == "tfrecord":
        out.mkdir()
        images = list_images(folder)
        payloads = [example(images.read(i), int(images.labels[i])) for i in range(len(images))]
        write_records(out / "a.tfrecord", payloads)
        return out
    if kind == "manifest":
        write_index(folder)
        return folder
    write_shards(folder, out, shard_bytes=20_000)
    if kind == "shards without index":
        for index in out.glob("*.idx"):
            index.unlink()
    return out


@pytest.mark.parametrize("kind", ["folder", "shards", "shards without index", "tfrecord", "manifest"])
def test_an_object_store_holds_what_a_disk_holds(kind, store, folder, tmp_path):
    local = packed(kind, folder, tmp_path / "packed")
    bucket = f"same-{kind.replace(' ', '-')}"
    upload(store.direct, local, bucket, "deep/er/")
    here, there = list_images(local), list_images(f"s3://{bucket}/deep/er")
    assert contents(there) == contents(here)
    assert there.labels.tolist() == here.labels.tolist()
    names = [there.name(i) for i in range(len(there))]
    assert names == [here.name(i).replace(str(local), f"s3://{bucket}/deep/er") for i in range(len(here))]
    assert contents(pickle.loads(pickle.dumps(there))) == contents(here)
    assert SECRET.encode() not in pickle.dumps(there)


def test_the_splits_of_an_object_store_are_recognised(store, folder, tmp_path):
    for part in ("Train", "val"):
        upload(store.direct, folder, "layout", f"set/{part}/")
        upload(store.direct, folder, "lonely", f"set/{part}/{part}/")
    train, test, layout = divide("s3://layout/set")
    assert (layout.train, layout.test) == ("s3://layout/set/Train", "s3://layout/set/val")
    assert contents(train) == contents(test) == contents(list_images(folder))
    with pytest.raises(UserError, match=r"s3://lonely/set/val holds val/ and no train/"):
        divide("s3://lonely/set/val")


def test_members_of_shards_are_read_by_range(store, folder, tmp_path):
    upload(store.direct, packed("shards", folder, tmp_path / "packed"), "ranges")
    images = list_images("s3://ranges")
    store.requests.clear()
    raw = images.read(3)
    ((_, path, asked),) = store.requests
    assert path == "/ranges/shard-000000.tar"
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    assert last - first + 1 == 512 + len(raw)  # with its header, which must match the index


def test_one_shard_can_be_named(store, folder, tmp_path):
    upload(store.direct, packed("shards", folder, tmp_path / "packed"), "single")
    images = list_images("s3://single/shard-000001.tar")
    assert {images.name(i).split(":member")[0].rsplit(":", 1)[0] for i in range(len(images))} == {
        "s3://single/shard-000001.tar"
    }


def test_more_objects_than_a_page_are_listed(store, tmp_path, monkeypatch):
    """Pages of 3 here, of 1,000 elsewhere; hidden objects and folder markers are left out."""
    listing = S3Storage._list
    monkeypatch.setattr(S3Storage, "_list", lambda *name, **more: listing(*name, **{"MaxKeys": 3, **more}))
    client = upload(store.direct, tmp_path, "many")
    for number in range(10):
        client.put_object(Bucket="many", Key=f"set/{number}.jpg", Body=b"x")
    for odd in ("set/.hidden.jpg", "set/.cache/1.jpg", "set/folder.jpg/", "other/1.jpg"):
        client.put_object(Bucket="many", Key=odd, Body=b"")
    for odd in ("set/a.heic", "set/b.heic", "set/c.txt", "set/@eaDir/1.jpg", "set/@eaDir/2.jpg", "set/Thumbs.db"):
        client.put_object(Bucket="many", Key=odd, Body=b"")
    store.requests.clear()
    images = list_images("s3://many/set/")
    assert images.source.left_out.counts == {SYSTEM: 1, SKIPPED: 3}
    assert images.source.left_out.types == {SKIPPED: {".heic": 2, ".txt": 1}}
    assert [images.name(i) for i in range(len(images))] == [f"s3://many/set/{number}.jpg" for number in range(10)]
    assert sum("continuation-token" in path for _, path, _ in store.requests) == 6  # 20 objects


@pytest.mark.parametrize("fault", ["500", "503", "close", "cut", "stall"])
def test_a_fault_that_passes_is_outlived(fault, store, folder):
    upload(store.direct, folder, "faults")
    images = list_images("s3://faults", patience=SHORT)
    expected = images.read(0)
    store.faults.extend([fault, fault])
    assert images.read(0) == expected
    assert not store.faults


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", r"InternalError \(HTTP 500\)"),
        ("503", r"SlowDown \(HTTP 503\)"),
        ("close", "connection closed|endpoint connection"),
        ("cut", "response streaming|incomplete read"),
        ("stall", "read timeout"),
    ],
)
def test_a_fault_that_stays_is_an_error_that_names_the_object(fault, said, store, folder):
    upload(store.direct, folder, "faults")
    images = list_images("s3://faults", patience=SHORT)
    store.always = fault
    with pytest.raises(UserError, match=said) as caught:
        images.read(0)
    assert str(caught.value).startswith("s3://faults/cat/000.jpg: cannot be read, 3 attempts failed")
    assert f"127.0.0.1:{store.port}" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_missing_object_store_is_named(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass@127.0.0.1:9")
    with pytest.raises(UserError, match=r"3 attempts failed, .* at 127\.0\.0\.1:9 ") as caught:
        list_images("s3://nowhere/images", patience=SHORT)
    assert "pass" not in str(caught.value).replace("s3://", "")


def test_a_refusal_is_not_repeated(store, folder):
    upload(store.direct, folder, "refused")
    images = list_images("s3://refused", patience=SHORT)
    store.always = "403"
    store.requests.clear()
    with pytest.raises(UserError, match=r"s3://refused/cat/000\.jpg: the store refuses it \(AccessDenied\)"):
        images.read(0)
    assert len(store.requests) == 1


def test_an_object_that_vanished_is_a_bad_sample_and_all_of_them_an_error(store, folder):
    client = upload(store.direct, folder, "vanishing")
    images = list_images("s3://vanishing")
    names = [images.source.name(i) for i in range(len(images))]
    client.delete_object(Bucket="vanishing", Key=names[0])
    with pytest.raises(BadSample, match="no such object"):
        images.read(0)
    for name in names:
        client.delete_object(Bucket="vanishing", Key=name)
    with pytest.raises(UserError, match="s3://vanishing is empty; bring the data back"):
        images.read(1)
    with pytest.raises(UserError, match="s3://vanishing is empty"):
        list_images("s3://vanishing")
    client.delete_bucket(Bucket="vanishing")
    with pytest.raises(UserError, match="there is no such bucket"):
        images.read(1)


def test_what_is_missing_is_one_line(monkeypatch, store):
    for wrong in ("s3://", "s3://key:secret@bucket/x", "s3://UPPER/x"):
        with pytest.raises(UserError, match="not of the form s3://bucket/prefix") as caught:
            list_images(wrong)
        assert "secret" not in str(caught.value)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "boto3", None)
        with pytest.raises(UserError, match=r"needs boto3, .* pip install 'iwm-fast\[s3\]'"):
            list_images("s3://bucket/x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="needs AWS_SECRET_ACCESS_KEY in the environment"):
        list_images("s3://bucket/x")


def rows(root, world, **changes):
    config = small_config(root, train__global_batch=8, **changes)
    found = []
    streams = [
        TrainingStream(config, list_images(root), ActionSpace(config.actions.groups), rank=rank, world=world)
        for rank in range(world)
    ]
    for _ in range(4):
        for stream in streams:
            batch = next(stream)
            found += [(int(i), s.numpy().tobytes()) for i, s in zip(batch.ids, batch.source, strict=True)]
    for stream in streams:
        stream.close()
    return found


def test_training_sees_the_same_samples_from_disk_shards_and_object_store_on_any_world_size(store, folder, tmp_path):
    expected = rows(folder, 1)
    shards = packed("shards", folder, tmp_path / "packed")
    records = packed("tfrecord", folder, tmp_path / "records")
    upload(store.direct, shards, "training")
    for root, world in ((shards, 1), (shards, 2), (records, 2), ("s3://training", 1), ("s3://training", 4)):
        assert rows(root, world) == expected


@pytest.mark.parametrize("kind", ["shards", "tfrecord"])
def test_shards_in_their_order_take_few_requests_and_outlive_faults(kind, store, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "KEPT_BYTES", 0)
    local = packed(kind, folder, tmp_path / "packed")
    bucket = f"in-order-{kind}"
    upload(store.direct, local, bucket)
    in_order = {"data__order": "shard", "data__streams": 1, "data__shuffle_window": 7}
    images = list_images(f"s3://{bucket}", patience=SHORT)
    config = small_config(local, train__global_batch=13, **in_order)
    with TrainingStream(config, images, ActionSpace(config.actions.groups)) as stream:
        store.requests.clear()
        store.faults.extend(["500", "cut"])
        for _ in range(2):
            assert sorted(next(stream).ids.tolist()) == list(range(13))
        taken = 13 * (2 + 3 + 3)  # and prefetched, and in DALI's graph
        assert len(store.requests) < taken / 3 + 2
        assert all(asked for _, _, asked in store.requests)
        store.always = "503"
        with pytest.raises(UserError, match=rf"^s3://{bucket}/\S+: cannot be read, 3 attempts failed"):
            list(itertools.islice(stream, 20))


def test_files_of_a_batch_are_read_several_at_a_time(store, folder):
    upload(store.direct, folder, "parallel")
    store.delay_s = 0.05
    store.most = 0
    rows("s3://parallel", 1)
    assert 4 <= store.most <= 16
    store.most = 0
    rows("s3://parallel", 1, data__readers=1)
    assert store.most == 1


def test_evaluation_reads_train_and_test_from_an_object_store(store, folder, tmp_path):
    write_classes(tmp_path / "test", 5, first=50)
    upload(store.direct, folder, "splits", "set/train/")
    upload(store.direct, tmp_path / "test", "splits", "set/test/")
    train, test = split("s3://splits/set")
    assert (len(train), len(test), train.classes) == (13, 5, ("cat", "dog"))
    _, test = open_splits("s3://splits/set", small_config(folder))
    images, labels = next(test.read())
    assert images.shape == (5, 32, 32, 3)
    assert labels.tolist() == [0, 0, 0, 1, 1]  # 50 to 54, the even ones are cats
    shards = packed("shards", folder, tmp_path / "packed")
    for part in ("train", "test"):
        upload(store.direct, shards, "splits", f"packed/{part}/")
    assert [len(part) for part in split("s3://splits/packed")] == [13, 13]


def test_an_object_store_can_be_indexed_verified_and_packed(store, folder, tmp_path):
    upload(store.direct, folder, "indexed", "x/")
    with pytest.raises(UserError, match="name a local file for the manifest with --out"):
        write_index("s3://indexed/x")
    write_index("s3://indexed/x", tmp_path / "x.tsv")
    write_index(folder, tmp_path / "y.tsv")
    tails = [(tmp_path / name).read_text().split("\n", 1)[1] for name in ("x.tsv", "y.tsv")]
    assert tails[0] == tails[1]
    store.requests.clear()
    assert contents(list_images(tmp_path / "x.tsv")) == contents(list_images(folder))
    assert all(path.startswith("/indexed/x/") for _, path, _ in store.requests)  # objects; nothing was listed
    assert verify("s3://indexed/x", device="cpu", threads=1)["decoded"] == 13
    write_shards("s3://indexed/x", tmp_path / "there", shard_bytes=20_000)
    write_shards(folder, tmp_path / "here", shard_bytes=20_000)
    for path in (tmp_path / "here").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


def test_dalis_own_reader_reads_the_same_bytes_from_the_object_store(store, folder, tmp_path, monkeypatch):
    """DALI's readers access object stores themselves; they lack an order by number and handling of bad files.

    Not through the proxy, a thread of this process: DALI holds Python's lock while it opens the shards.
    """
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.direct)
    upload(store.direct, packed("shards", folder, tmp_path / "packed"), "dali")
    images = list_images("s3://dali")
    shards = [f"s3://dali/{name}" for name in images.source.files]
    rows = dali_shards(shards, [shard.replace(".tar", ".idx") for shard in shards], ["jpg", "cls"])
    assert [image for image, _ in rows] == contents(images)


def command(*words, cwd):
    words = [sys.executable, "-m", "iwm_fast", *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_secret_is_in_no_file_and_no_output(store, folder, tmp_path):
    upload(store.direct, folder, "quiet")
    words = [
        *TINY_WORDS,
        "data.root=s3://quiet",
        "train.schedule_steps=2",
        "data.store_timeout=1",
        "data.store_attempts=2",
    ]
    done = command("pretrain", *words, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "13 images of an image folder" in done.stderr
    store.always = "500"
    refused = command("pretrain", *words, "--out", tmp_path / "other", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "s3://quiet: cannot be read, 2 attempts failed" in refused.stderr
    debugged = command("--debug", "pretrain", *words, "--out", tmp_path / "third", cwd=tmp_path)
    assert "Traceback" in debugged.stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(folder)]
    shown = [text.encode() for run in (done, refused, debugged) for text in (run.stdout, run.stderr)]
    assert len(written) > 5
    for text in written + shown:
        assert SECRET.encode() not in text
        assert json.dumps(SECRET)[1:-1].encode() not in text


def test_waiting_ends_when_the_storage_is_closed(store, folder):
    upload(store.direct, folder, "closing")
    storage = S3Storage("s3://closing", Patience(timeout_s=0.5, attempts=50))
    store.always = "500"
    storage.close()
    with pytest.raises(UserError, match="1 attempts failed"):
        storage.read("cat/000.jpg")


def test_a_copy_in_an_object_store_is_the_same_data_and_sizes_come_with_the_list(store, folder):
    upload(store.url, folder, "moved", "train/")
    here = identity_of(list_images(folder))
    images = list_images("s3://moved/train/")
    store.requests.clear()
    assert identity_of(images) == here
    assert [method for method, _, _ in store.requests] == ["GET"]
    (folder / "more").mkdir()
    write_classes(folder / "more", 1)
    assert difference(identity_of(list_images(folder)), here, images).startswith("13 samples, ")


def test_objects_that_did_not_change_are_not_read_again_for_a_manifest(store, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_SPAN", 5)
    upload(store.direct, folder, "again", "x/")
    first = write_index("s3://again/x", tmp_path / "x.tsv", check=True)
    before = (tmp_path / "x.tsv").read_bytes()
    store.requests.clear()
    assert write_index("s3://again/x", tmp_path / "x.tsv", check=True) == first | {"unchanged": 13}
    assert (tmp_path / "x.tsv").read_bytes() == before
    assert not [path for method, path, _ in store.requests if method == "GET" and path.endswith(".jpg")]
    assert len(store.requests) == 1 + 3 * 2  # the listing; a question and a list per part of five
    changed = folder / "dog/003.jpg"
    changed.write_bytes(encode(picture(50, 20)))
    upload(store.direct, folder / "dog", "again", "x/dog/")
    store.requests.clear()
    found = write_index("s3://again/x", tmp_path / "x.tsv", check=True)
    assert found["unchanged"] == 12
    assert [path for method, path, _ in store.requests if method == "GET" and path.endswith(".jpg")] == [
        "/again/x/dog/003.jpg"
    ]
    write_index(folder, tmp_path / "y.tsv", check=True)
    assert table(tmp_path / "x.tsv") == table(tmp_path / "y.tsv")


def table(manifest):
    return manifest.read_text().split("\n")[1:]


def test_no_shard_of_an_object_store_is_read_by_anothers_index(store, tmp_path):
    """wds2idx's one name for shards with dots, in an object store without modification times."""
    wds2idx = pytest.importorskip("wds2idx")
    for number in range(2):
        shard = write_tar(tmp_path / f"train.{number}.tar", [(f"{n}.ppm", b"%d" % n * 900) for n in range(number, 9)])
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "train.idx"), verbose=False) as creator:
            creator.create_index()
    upload(store.direct, tmp_path, "indexes")
    images = list_images("s3://indexes")
    assert contents(images) == [b"%d" % n * 900 for number in range(2) for n in range(number, 9)]
    assert list(images.source.left_out.counts.values()) == [1]
    store.requests.clear()
    list_images("s3://indexes/train.1.tar")
    assert len(store.requests) <= 12  # the listing, the index, the shard's length and its headers in three places
