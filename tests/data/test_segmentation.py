from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import encode, png, turned
from PIL import Image

from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import list_images
from iwm_fast.data.segmentation import divide_masked, is_masked, read_mask, split_masked
from iwm_fast.data.tools.synth import draw_dataset
from iwm_fast.errors import UserError


def blocks(width, height):
    """Return a mask of large rectangles of four classes, and an image that shows each class in its own gray."""
    y, x = np.mgrid[0:height, 0:width]
    mask = (2 * (y > 0.4 * height) + (x > 0.6 * width)).astype(np.uint8)
    return mask, np.repeat((60 * mask)[..., None], 3, axis=2)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 50), (41, 77), (20, 20)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_mask_and_clean_view_show_the_same_part(tmp_path, width, height, orientation):
    """The image is upright, cropped to its largest centred square; the mask is stored upright."""
    mask, image = blocks(width, height)
    stored = image if orientation == 1 else np.rot90(image)  # 6: turned clockwise when shown
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "a.png").write_bytes(turned(Image.fromarray(np.ascontiguousarray(stored)), orientation, "PNG"))
    Image.fromarray(mask).save(tmp_path / "m.png")
    view = next(iter(load_clean(list_images(tmp_path / "seen"), 32, threads=1))).images[0, :, :, 0].numpy()
    seen = np.rint(view / 60)
    found = read_mask(tmp_path / "m.png", 32, tmp_path / "seen" / "a.png")
    assert found.shape == (32, 32)
    assert (found == seen).mean() > 0.9  # except for pixels that resampling mixes at borders
    inner = np.abs(view / 60 - seen) < 1e-6
    edges = np.zeros_like(inner)
    edges[1:] |= found[1:] != found[:-1]
    edges[:, 1:] |= found[:, 1:] != found[:, :-1]
    near = torch.nn.functional.max_pool2d(torch.from_numpy(edges.astype(np.float32))[None], 5, 1, 2)[0].numpy() > 0
    np.testing.assert_array_equal(found[inner & ~near], seen[inner & ~near])


def test_a_palettes_numbers_count_and_not_its_colours(tmp_path):
    mask, image = blocks(32, 32)
    Image.fromarray(image).save(tmp_path / "a.png")
    coloured = Image.fromarray(mask).convert("P")
    coloured.putdata(mask.flatten().tolist())
    coloured.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, 99, 99, 99])
    coloured.save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == "P"
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 32, tmp_path / "a.png"), mask)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_masks_numbers_are_read_as_they_are_stored_at_any_depth(tmp_path, depth):
    mask, image = blocks(32, 32)
    mask %= min(4, 2**depth)
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "m.png").write_bytes(png(mask, depth, 0))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 32, tmp_path / "a.png"), mask)


def test_a_turned_tiff_has_the_size_of_its_upright_mask(tmp_path):
    mask, image = blocks(41, 77)
    (tmp_path / "a.tif").write_bytes(turned(np.ascontiguousarray(np.rot90(image)), 6, "TIFF"))
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", 32, tmp_path / "a.tif").shape == (32, 32)


def test_a_mask_that_exif_turns_is_turned_as_its_image_is(tmp_path):
    mask, image = blocks(32, 32)
    for name, upright in (("a.png", image), ("m.png", mask)):
        (tmp_path / name).write_bytes(turned(np.ascontiguousarray(np.rot90(upright, 2)), 3, "PNG"))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 32, tmp_path / "a.png"), mask)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (png(np.full((32, 32), 1000), 16, 0), "class number 1000; classes go from 0 to 254, 255 is no class"),
        (encode(np.zeros((32, 32), np.uint8)), "is a JPEG file; a mask is a PNG"),
        (encode(np.zeros((32, 32, 3), np.uint8), "PNG"), "has mode RGB; a mask is a PNG of one channel"),
    ],
    ids=["number too large", "jpeg", "colours"],
)
def test_what_is_no_mask_is_refused(tmp_path, raw, reason):
    Image.fromarray(blocks(32, 32)[1]).save(tmp_path / "a.png")
    (tmp_path / "m.png").write_bytes(raw)
    with pytest.raises(UserError, match=reason):
        read_mask(tmp_path / "m.png", 32, tmp_path / "a.png")


def test_generated_masks_lie_on_the_shapes(tmp_path):
    """Colours differ inside and outside of a mask; classes take turns in their order."""
    draw_dataset(tmp_path / "s", classes=3, train=12, test=4, size=32, segments=True)
    assert is_masked(tmp_path / "s")
    train, test = split_masked(tmp_path / "s")
    assert (len(train), len(test)) == (12, 4)
    for number, mask in enumerate(train.masks):
        image = train.image(number)
        classes = read_mask(mask, 32, image)
        assert set(np.unique(classes)) == {0, 1 + number % 3}
        pixels = np.asarray(Image.open(image)).astype(float)
        inside, outside = pixels[classes > 0].mean(axis=0), pixels[classes == 0].mean(axis=0)
        assert np.abs(inside - outside).max() > 15


def test_a_folder_without_train_and_test_is_split_as_images_are(tmp_path):
    draw_dataset(tmp_path / "s", classes=2, train=10, test=2, size=32, segments=True)
    train, test = split_masked(tmp_path / "s" / "train")
    assert (len(train), len(test)) == (8, 2)
    assert not {*train.masks} & {*test.masks}
    assert all(train.image(row).stem == mask.stem for row, mask in enumerate(train.masks))
    with pytest.raises(UserError, match="has no images/ and masks/ beside each other"):
        split_masked(tmp_path / "s" / "train" / "images")


def masked(root, folder, names):
    """Write small images and masks below ``root``, as images/FOLDER/NAME and masks/FOLDER/NAME."""
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (root / kind / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.new(mode, (8, 8)).save(root / kind / folder / f"{name}.png")


@pytest.mark.parametrize(("train", "test"), [("train", "val"), ("Training", "validation"), ("train", "test")])
@pytest.mark.parametrize("inside", [False, True], ids=["images in splits", "splits in images"])
def test_the_splits_of_masked_images_are_recognised(tmp_path, train, test, inside):
    """ADE20K has images/training beside masks/training, others train/images beside train/masks."""
    for part, names in ((train, "abc"), (test, "de")):
        masked(tmp_path if inside else tmp_path / part, part if inside else ".", names)
    assert is_masked(tmp_path)
    learned, tested, layout = divide_masked(tmp_path)
    assert [mask.stem for mask in learned.masks] == ["a", "b", "c"]
    assert [mask.stem for mask in tested.masks] == ["d", "e"]
    assert [learned.image(row).stem for row in range(3)] == ["a", "b", "c"]
    place = f"{tmp_path}/images" if inside else str(tmp_path)
    assert (layout.train, layout.test) == (f"{place}/{train}", f"{place}/{test}")


def test_ambiguous_splits_and_masks_without_an_image_are_said(tmp_path, monkeypatch):
    masked(tmp_path, "train", "abc")
    with pytest.raises(UserError, match=r"images holds train/ and no test/ or val/"):
        divide_masked(tmp_path)
    masked(tmp_path, "val", "de")
    (tmp_path / "images" / "val" / "d.png").unlink()
    said = (f"1 masks of {tmp_path}/masks without an image",)
    assert divide_masked(tmp_path)[2].unused == said
    monkeypatch.chdir(tmp_path.parent)
    assert divide_masked(Path(tmp_path.name))[2].unused == said
    masked(tmp_path, "Val", "f")
    with pytest.raises(UserError, match="images holds Val/ and val/"):
        divide_masked(tmp_path)
