from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import reference_views as reference
from made_images import write_images
from PIL import Image
from small_run import small_config

from iwm_fast.data.decode.encoded import decode_upright
from iwm_fast.data.tools import contact_sheet
from iwm_fast.data.tools.preview import write_preview
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError

COUNT = 18  # more than are rendered at once, and more than there are files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    write_images(root, 15, size=(60, 50))
    (root / "007.jpg").write_bytes(b"not an image")
    return root


def preview(folder, out, groups, seed=0, sources=1):
    config = small_config(
        folder,
        actions__groups=groups,
        views__sources_per_target=sources,
        actions__grayscale_probability=0.4,
        actions__blur_probability=0.4,
        actions__solarize_probability=0.4,
        data__max_bad_fraction=0.1,
    )
    write_preview(config, folder, out, COUNT, seed)
    return config, json.loads((out / "params.json").read_text())


def load(out, number, name):
    return np.asarray(Image.open(out / f"{number:03d}_{name}.png"))


def again(base, values):
    """Recreate a view from its base and the written parameters."""
    out = reference.jitter(base, *(values[n] for n in ("brightness", "contrast", "saturation", "hue_degrees")))
    if values.get("grayscale"):
        out = reference.grayscale(out)
    if values.get("blur_sigma"):
        out = reference.blur(out, values["blur_sigma"])
    if values.get("solarize_threshold") is not None:
        out = reference.solarize(out, values["solarize_threshold"])
    if values.get("compression_quality") is not None:
        out = reference.compress(out, values["compression_quality"])
    return out


def placed(params, geometry):
    image = decode_upright(open(params["file"], "rb").read(), 10**7)  # noqa: PTH123, SIM115
    x, y, width, height = geometry["crop"]
    out = reference.resize(image[y : y + height, x : x + width], 32)
    return np.rot90(out[:, ::-1] if geometry["flip"] else out, geometry["rotation"])


GROUPS = [["photometric"], ["photometric", "geometric"], ["photometric", "geometric", "compression"]]


@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: groups[-1])
def test_pictures_follow_from_the_written_parameters(folder, tmp_path, groups):
    config, params = preview(folder, tmp_path, groups)
    assert len(params) == COUNT
    for number, one in enumerate(params):
        assert not one["file"].endswith("007.jpg")
        base = load(tmp_path, number, "base")
        assert reference.error(placed(one, one), base) <= 0.5
        if len(groups) >= 2:
            source_base = load(tmp_path, number, "source_base")
            assert reference.error(placed(one, one["source_geometry"]), source_base) <= 0.5
        else:
            assert one["source_geometry"] is None
            source_base = base
        source = load(tmp_path, number, "source")
        assert reference.error(again(base, one["target"]), load(tmp_path, number, "target")) <= 0.02
        # A level that is rounded to the other side spreads over a block of the JPEG.
        assert reference.error(again(source_base, one["source"]), source) <= (0.2 if "compression" in groups else 0.02)
        assert ("compression_quality" in one["source"]) == ("compression" in groups)
        seen = np.zeros((4, 4, 1), bool)
        seen.reshape(-1)[one["context_patches"]] = True
        hidden = np.where(seen.repeat(8, axis=0).repeat(8, axis=1), source, 128)
        assert np.array_equal(hidden, load(tmp_path, number, "masked"))
        assert len(one["action"]) == len(one["action_names"])
        assert one["target_patches"]
    assert config.model.image == 32


def test_keys_and_neutral_values_are_as_documented(folder, tmp_path):
    _, params = preview(folder, tmp_path, ["photometric"])
    first = params[0]
    assert list(first) == [
        "file", "crop", "flip", "rotation", "source_geometry", "target", "source",
        "action", "action_names", "context_patches", "target_patches",
    ]  # fmt: skip
    jitter = ["brightness", "contrast", "saturation", "hue_degrees"]
    assert list(first["target"]) == jitter
    assert list(first["source"]) == [*jitter, "grayscale", "blur_sigma", "solarize_threshold"]
    neutral = [one["target"] for one in params if one["target"]["hue_degrees"] == 0]
    assert neutral[0] == {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue_degrees": 0.0}
    kept = [one["source"] for one in params if one["source"]["solarize_threshold"] is None]
    assert kept
    assert {one["blur_sigma"] for one in (p["source"] for p in params)} > {0.0}


def test_more_sources_are_shown_and_described_as_the_first_is(folder, tmp_path):
    groups = ["photometric", "geometric"]
    _, alone = preview(folder, tmp_path / "one", groups)
    _, params = preview(folder, tmp_path / "three", groups, sources=3)
    assert [one | {"more_sources": other["more_sources"]} for one, other in zip(alone, params, strict=True)] == params
    for number, one in enumerate(params[:4]):
        assert len(one["more_sources"]) == 2
        for k, more in enumerate(one["more_sources"], start=1):
            source_base = load(tmp_path / "three", number, f"source_base_{k}")
            assert reference.error(placed(one, more["source_geometry"]), source_base) <= 0.5
            source = load(tmp_path / "three", number, f"source_{k}")
            assert reference.error(again(source_base, more["source"]), source) <= 0.02
            assert more["action"] != one["action"]


def test_the_seed_chooses_images_and_parameters(folder, tmp_path):
    same = [preview(folder, tmp_path / name, ["photometric"], seed)[1] for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize("write", [partial(write_preview, small_config("unread")), write_shards])
@pytest.mark.parametrize("place", [".", "train/views"])
def test_an_output_among_the_images_would_be_read_as_images_and_is_refused(write, place, tmp_path):
    root = tmp_path / "photos"
    (root / "train").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "train" / "a.png")
    before = sorted(tmp_path.rglob("*"))
    more = (1, 0) if isinstance(write, partial) else ()
    with pytest.raises(UserError, match=r"lies in .*; choose another --out"):
        write(root, root / place, *more)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop: cannot be written"):
        write(root, tmp_path / "loop", *more)


def test_an_output_folder_that_cannot_be_made_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        preview(folder, tmp_path / "file", ["photometric"])


def test_compression_is_written_as_its_quality_or_null_and_encoded_as_its_distance_from_the_best(folder, tmp_path):
    _, params = preview(folder, tmp_path, ["photometric", "compression"])
    assert {one["source"]["compression_quality"] is None for one in params} == {True, False}
    for one in params:
        quality = one["source"]["compression_quality"]
        told = dict(zip(one["action_names"], one["action"], strict=True))
        assert told["compression"] == (quality is not None)
        assert told["compression_quality"] == pytest.approx(0 if quality is None else (100 - quality) / 100)


@pytest.mark.parametrize(("groups", "sources", "names"), [
    (["photometric"], 1, ["base", "source", "masked", "target"]),
    (["photometric", "geometric"], 2, ["base", "source_base", "source", "masked", "target"]),
])  # fmt: skip
def test_the_sheet_shows_every_picture_of_a_row_and_its_parameters(
    folder, tmp_path, monkeypatch, groups, sources, names
):
    monkeypatch.setattr(contact_sheet, "ROWS", 5)
    _, params = preview(folder, tmp_path, groups, sources=sources)
    sheet = np.asarray(Image.open(tmp_path / contact_sheet.FILE).convert("RGB"))
    side, gap = contact_sheet._SIDE, contact_sheet._GAP
    top = 2 * contact_sheet._LINE
    for row in range(5):
        number, k = divmod(row, sources)
        for place, name in enumerate(names):
            left = gap + place * (side + gap)
            shown = sheet[top : top + side, left : left + side]
            picture = load(tmp_path, number, name if not k or name in ("base", "target") else f"{name}_{k}")
            assert (shown[3::6, 3::6] == picture).all()  # 32 pixels on 192
        lines = contact_sheet._lines(params[number], [params[number], *params[number].get("more_sources", [])][k], k)
        assert lines[1].startswith("brightness  ")
        text = sheet[top : top + 17 * len(lines), gap + len(names) * (side + gap) :]
        assert (text.min(axis=(1, 2)) < 100).sum() > 5 * len(lines)  # ink on every line
        assert (text[:, -8:] == 255).all()  # and none is cut off
        top += max(side, 17 * len(lines)) + gap
    assert sheet.shape[0] == top
