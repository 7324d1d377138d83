from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference_views as reference
from made_images import encode, picture, turned, write_images

from iwm_fast.cli.main import main
from iwm_fast.data.decode.encoded import decode_upright
from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import list_images
from iwm_fast.data.tools.verify import verify


def write(root, **files):
    for name, raw in files.items():
        (root / name.replace("_", ".")).write_bytes(raw)


def test_every_file_is_counted_and_the_bad_ones_are_named(tmp_path):
    good = write_images(tmp_path / "good", 5)
    raw = good[0].read_bytes()
    write(
        tmp_path,
        cut_jpg=raw[: len(raw) // 2],
        text_jpg=b"no image",
        empty_png=b"",
        turned_webp=turned(picture(20, 30), 6, "WEBP"),
    )
    found = verify(tmp_path, device="cpu", threads=1)
    assert (found["files"], found["decoded"]) == (9, 6)
    assert {Path(bad["file"]).name for bad in found["bad"]} == {"cut.jpg", "text.jpg", "empty.png"}
    assert all(Path(bad["file"]).exists() and bad["reason"] for bad in found["bad"])


def test_a_folder_of_bad_files_only_is_reported_whole(tmp_path):
    write(tmp_path, a_jpg=b"no", b_jpg=b"image")
    assert verify(tmp_path, device="cpu", threads=1)["decoded"] == 0


@pytest.mark.parametrize(("bad", "code"), [([], 0), (["torn.jpg"], 1), (["torn.jpg", "empty.png"], 1)])
def test_the_exit_code_says_whether_all_files_can_be_used(tmp_path, capsys, bad, code):
    """A script that checks before a training need not parse the table; the JSON is written either way."""
    good = write_images(tmp_path / "set", 3)
    for name in bad:
        (tmp_path / "set" / name).write_bytes(b"no image" if name != "empty.png" else b"")
    assert main(["data", "verify", str(tmp_path / "set"), "--json", str(tmp_path / "v.json")]) == code
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert (verdict["files"], verdict["decoded"]) == (len(good) + len(bad), len(good))
    assert f"{len(good)} of {len(good) + len(bad)} files decode" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "set"), "--json", "-"]) == code


def test_clean_views_are_the_centred_square(tmp_path):
    paths = write_images(tmp_path, 7, size=(50, 34))
    (tmp_path / "003.jpg").write_bytes(b"broken")
    batches = list(load_clean(list_images(tmp_path), 24, device="cpu", threads=1, batch=3))
    assert np.concatenate([batch.rows for batch in batches]).tolist() == [0, 1, 2, 4, 5, 6]
    assert [batch.failed for batch in batches] == [{}, {3: "cannot identify image file"}, {}]
    for batch in batches:
        for row, image in zip(batch.rows, batch.images.numpy(), strict=True):
            upright = decode_upright(paths[row].read_bytes(), 10**7)
            height, width = upright.shape[:2]
            left = (width - height) // 2
            expected = reference.resize(upright[:, left : left + height], 24)
            assert reference.error(expected, image) <= 0.5


def test_a_batch_in_which_nothing_decodes_is_empty(tmp_path):
    write(tmp_path, a_jpg=b"no", b_jpg=encode(picture(9, 9)))
    first, second = load_clean(list_images(tmp_path), 24, device="cpu", threads=1, batch=1)
    assert first.images.shape == (0, 24, 24, 3)
    assert list(first.failed) == [0]
    assert second.rows.tolist() == [1]
