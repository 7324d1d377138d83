"""Batches do not depend on who checks the images: the data thread, other processes, or the manifest."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from made_images import broken_tables, encode, picture, turned, write_images
from made_sources import pack, write_classes
from small_run import small_config

from iwm_fast.actions.space import ActionSpace
from iwm_fast.data import samples as samples_module
from iwm_fast.data.checkers import Checkers
from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.decode.verdicts import PILLOW, PLAIN, RULES
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.samples import FileStore
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.views.devices import image_checkers

FILES = 37
LIMIT = 10**7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Plain files among bad, turned and odd ones."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, FILES)
    raw = (root / "004.jpg").read_bytes()
    odd = {
        "004.jpg": raw[: len(raw) // 2],
        "005.jpg": b"",
        "011.jpg": broken_tables(encode(picture(40, 30))),
        "012.jpg": turned(picture(40, 30), 6),
        "017.jpg": encode(picture(40, 30), "GIF"),
        "018.jpg": encode(picture(40, 30), "GIF")[:60],
        "021.jpg": b"text",
    }
    for name, content in odd.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def manifest(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("lists") / "checked.tsv"
    assert write_index(folder, out, check=True)["checked"] == {"plain": FILES - 5, "pillow": 1, "bad": 4}
    return out


@pytest.fixture(autouse=True)
def _small_sets_are_worth_checkers(monkeypatch):
    monkeypatch.setattr(samples_module, "_WORTH_CHECKERS", 0)
    monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)


def drawn(root, batches=12, **changes):
    """Return everything in the first batches, and the records of bad samples."""
    run_dir = changes.pop("run_dir", None)
    config = small_config(root, data__max_bad_fraction=0.5, **changes)
    rows = []
    with TrainingStream(config, list_images(root), ActionSpace(config.actions.groups), run_dir=run_dir) as stream:
        for _ in range(batches):
            batch = next(stream)
            parts = batch.source, batch.target, batch.action, batch.patches.context, batch.patches.target
            rows.append((batch.ids.tolist(), *(np.asarray(part).tobytes() for part in parts)))
        return rows, stream.bad


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return *drawn(folder, run_dir=run), (run / "bad_samples.jsonl").read_text()


@pytest.mark.parametrize("changes", [{"data__checkers": 1}, {"data__checkers": 2, "data__readers": 2}], ids=str)
def test_batches_and_the_record_of_bad_files_are_the_same_with_checkers(folder, alone, tmp_path, changes):
    assert (*drawn(folder, run_dir=tmp_path, **changes), (tmp_path / "bad_samples.jsonl").read_text()) == alone


def test_threads_that_read_check_to_the_same_end(folder, alone):
    assert drawn(folder, data__readers=3) == alone[:2]


def test_batches_by_verdicts_of_the_manifest_are_the_same(folder, manifest, alone):
    assert drawn(manifest) == alone[:2]


def counted(monkeypatch):
    """Count the files that this process inspects."""
    looked = []
    inspect = samples_module.inspect
    monkeypatch.setattr(samples_module, "inspect", lambda raw, limit: looked.append(len(raw)) or inspect(raw, limit))
    return looked


def test_the_data_thread_looks_only_into_files_that_may_be_bad(folder, manifest, monkeypatch):
    looked = counted(monkeypatch)
    store = FileStore(list_images(folder), LIMIT, checkers=2)
    everything = np.arange(FILES)
    store.expect(everything)
    store.ask(everything.tolist())
    assert opened(store) == [4, 5, 18, 21]
    store.close()
    assert looked == [60, 4]  # cut GIF and text; reading finds the empty file, and Pillow decides on the cut JPEG
    looked.clear()
    assert opened(FileStore(list_images(manifest), LIMIT)) == [4, 5, 18, 21]
    assert len(looked) == 3  # for the index Pillow decoded the cut JPEG as well


@pytest.mark.parametrize("kind", ["folder", "webdataset", "tfrecord"])
def test_a_first_epoch_after_a_check_inspects_no_file(tmp_path, monkeypatch, kind):
    write_classes(tmp_path / "images", 23)
    root = pack(tmp_path / "images", tmp_path / "packed", kind)
    looked = counted(monkeypatch)
    asked = []
    monkeypatch.setattr(Checkers, "ask", lambda _, rows: asked.extend(rows.tolist()))
    monkeypatch.setattr(Checkers, "answers", lambda *_: [])
    plain = drawn(root, batches=3)  # 24 samples
    assert len(looked) == 23
    drawn(root, batches=3, data__checkers=1)
    assert sorted(set(asked)) == list(range(23))
    write_index(root, check=True)
    looked.clear()
    asked.clear()
    assert drawn(root, batches=3) == drawn(root, batches=3, data__checkers=1) == plain
    assert looked == asked == []


def test_a_file_that_changed_after_the_check_is_bad_until_it_is_checked_again(tmp_path, monkeypatch):
    write_classes(tmp_path, 5)
    write_index(tmp_path, check=True)
    changed = encode(picture(70, 50))
    (tmp_path / "cat/002.jpg").write_bytes(changed)
    looked = counted(monkeypatch)
    assert opened(FileStore(list_images(tmp_path), LIMIT)) == [1]  # named: it changed since it was indexed
    write_index(tmp_path, check=True)
    images = list_images(tmp_path)
    assert images.verdict(1, LIMIT) == (PLAIN, 1, 70, 50, len(changed))
    assert opened(FileStore(images, LIMIT)) == looked == []


def opened(store):
    """Read all files in turn; return the numbers of the bad ones."""
    bad = []
    for file in range(len(store.images)):
        try:
            store.get(file)
        except BadSample:
            bad.append(file)
    return bad


def test_a_manifests_verdicts_are_those_of_looking(folder, manifest):
    images = list_images(manifest)
    store = FileStore(list_images(folder), LIMIT)
    bad = opened(store)
    found = [images.verdict(file, LIMIT) for file in range(FILES)]
    assert [file for file in range(FILES) if found[file] is None] == bad
    assert images.unchecked == len(bad)
    good = [file for file in range(FILES) if file not in bad]
    for file in good:
        assert found[file] == store._known[file] or found[file][0] == store._known[file][0] == PILLOW
    assert found[12][1] == 6
    assert {found[file][0] for file in good} == {PLAIN, PILLOW}


def test_no_verdict_of_a_manifest_stands_for_another_file(tmp_path, monkeypatch):
    paths = write_images(tmp_path, 3)
    write_index(tmp_path, check=True)
    looked = counted(monkeypatch)
    raw = paths[1].read_bytes()
    paths[1].write_bytes(raw[:-9] + b"12345" + raw[-4:])  # of the same length
    store = FileStore(list_images(tmp_path), LIMIT)
    assert opened(store) == [1]
    assert store._reasons == {1: "it changed since it was indexed: its checksum differs"}
    assert not looked
    write_index(tmp_path, check=True)  # checked again
    assert opened(FileStore(list_images(tmp_path), LIMIT)) == []


@pytest.mark.parametrize("rules", [RULES + 1, 0], ids=["of other rules", "without a check"])
def test_a_manifest_without_verdicts_by_these_rules_has_its_files_checked(tmp_path, monkeypatch, rules):
    write_images(tmp_path, 3)
    write_index(tmp_path, tmp_path / "list.tsv", check=bool(rules))
    text = (tmp_path / "list.tsv").read_text().replace(f"\tcheck={RULES}", f"\tcheck={rules}")
    (tmp_path / "list.tsv").write_text(text)
    looked = counted(monkeypatch)
    assert opened(FileStore(list_images(tmp_path / "list.tsv"), LIMIT)) == []
    assert len(looked) == 3


def test_a_larger_image_than_allowed_is_refused_whatever_the_manifest_says(tmp_path):
    write_images(tmp_path, 2)
    write_index(tmp_path, check=True)
    with pytest.raises(BadSample, match=r"40 x 30 pixels: more than data\.max_pixels \(1000\)"):
        FileStore(list_images(tmp_path), 1000).get(0)


def test_verdicts_follow_the_rows_that_were_taken(folder, manifest):
    rows = np.array([17, 12, 3])
    taken = list_images(manifest).take(rows)
    assert [taken.verdict(sample, LIMIT)[0] for sample in range(3)] == [PILLOW, PLAIN, PLAIN]
    store = FileStore(list_images(folder).take(rows), LIMIT, checkers=1)
    store.expect(np.arange(3))
    store.ask([0, 1, 2])
    assert [store._known[sample][1] for sample in range(3)] == [1, 6, 1]
    store.close()


def test_checkers_open_an_unchecked_manifest_themselves(folder, tmp_path, monkeypatch):
    write_index(folder, tmp_path / "list.tsv")
    images = list_images(tmp_path / "list.tsv")
    assert images.unchecked == FILES
    store = FileStore(images, LIMIT, checkers=1)
    looked = counted(monkeypatch)
    good = [3, 12, 17]
    store.expect(np.array(good))
    store.ask(good)
    assert [store._known[file][1] for file in good] == [1, 6, 1]
    assert not looked
    store.close()


def test_a_checker_that_dies_is_said_once_and_its_files_are_checked_here(folder, alone, capfd):
    config = small_config(folder, data__max_bad_fraction=0.5, data__checkers=2)
    with TrainingStream(config, list_images(folder), ActionSpace(config.actions.groups)) as stream:
        for checker in stream._reader.store._checkers._all:
            os.kill(checker.process.pid, signal.SIGKILL)
        assert [next(stream).ids.tolist() for _ in range(12)] == [row[0] for row in alone[0]]
        assert stream.bad == alone[1]
    said = capfd.readouterr().err
    assert said.count("ended (exit code -9") == 2
    assert said.count("1 go on, results stay the same") == said.count("checks the images itself") == 1


def test_more_than_a_socket_holds_is_requested_at_once(folder):
    source = list_images(folder).source
    checkers = Checkers(source, LIMIT, 1)
    rows = np.arange(FILES).repeat(1)
    try:
        for _ in range(3):  # repeated requests have one reply
            checkers.ask(rows)
        found = np.concatenate([rows for rows, _ in checkers.answers(rows)])
        assert sorted(found.tolist()) == rows.tolist()
        assert checkers.answers(rows) == []
    finally:
        checkers.close()


def test_checkers_end_with_their_stream(folder):
    config = small_config(folder, data__max_bad_fraction=0.5, data__checkers=2)
    with TrainingStream(config, list_images(folder), ActionSpace(config.actions.groups)) as stream:
        processes = [checker.process for checker in stream._reader.store._checkers._all]
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2


def test_a_cpu_and_a_small_set_have_no_checkers(folder, monkeypatch):
    assert image_checkers(None, "cpu") == 0
    assert image_checkers(3, "cpu") == 3
    monkeypatch.setattr("iwm_fast.data.views.devices.usable_cores", lambda: 128)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [image_checkers(None, "gpu", world) for world in (1, 8, 16)] == [2, 2, 1]
    monkeypatch.setattr(samples_module, "_WORTH_CHECKERS", 2000)
    assert not FileStore(list_images(folder), LIMIT, checkers=2).looks_ahead
