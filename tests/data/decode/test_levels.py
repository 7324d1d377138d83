"""The levels of every kind of pixel: a table of small files, and one result from everything that reads them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from made_images import encode, picture, png, png_chunk, tiff, turned
from PIL import Image

from iwm_fast.data.decode.encoded import BadSample, decode_upright, inspect, upright_size
from iwm_fast.data.decode.levels import upright_rgb
from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import list_images
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.verify import verify

SIDE, LIMIT = 31, 10**6
RAMP = np.linspace(0.1, 1, SIDE)[None].repeat(SIDE, 0) * np.linspace(0.5, 1, SIDE)[:, None]  # in (0, 1]
COLOUR = picture(SIDE, SIDE)
GRAY = (RAMP * 255).astype(np.uint8)
DEEP = (RAMP * 65535).astype(np.uint16)
HIGH = (DEEP >> 8).astype(np.uint8)


def gray(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, axis=2)


def bits(depth):
    """Return RAMP in this many bits, and as levels."""
    values = (RAMP * (2**depth - 1)).astype(np.int64)
    return values, gray(values * 255 // (2**depth - 1))


def deep(*channels):
    return np.stack(channels, axis=2).astype(np.uint16)


def pgm(largest):
    values = (RAMP * largest).astype(">u2")
    return b"P5\n%d %d\n%d\n" % (SIDE, SIDE, largest) + values.tobytes(), gray(np.rint(values / largest * 65535) // 256)


def palette(alphas=None):
    image = Image.fromarray(COLOUR).quantize(32)
    return encode(image, "PNG", **({} if alphas is None else {"transparency": alphas})), np.asarray(
        image.convert("RGB")
    )


def see_through(mode):
    """Return every alpha from 0 to 255 over colours that are present all the same."""
    image = Image.fromarray(COLOUR).convert(mode)
    image.putalpha(Image.fromarray(GRAY // 2 - 12))
    return image


def cmyk(transform):
    """Return inks stored inverted, as Adobe does, black in one half; 2: as YCCK, where libjpeg's C is 255 - R."""
    ink, black = 255 - COLOUR, np.where(RAMP > 0.5, 90, 0).astype(np.uint8)
    stored = np.asarray(Image.fromarray(ink).convert("YCbCr")) if transform == 2 else 255 - ink
    planes = [*np.moveaxis(stored, 2, 0), 255 - black]
    image = Image.merge("CMYK", [Image.fromarray(255 - plane) for plane in planes])  # Pillow inverts on saving
    raw = encode(image, quality=100, subsampling=0)
    at = raw.index(b"Adobe") + 11
    paper = (255 - ink.astype(int)) * (255 - black.astype(int))[..., None] / 255
    return raw[:at] + bytes([transform]) + raw[at + 1 :], paper


FIRST, SECOND = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
KEY = png_chunk(b"tRNS", struct.pack(">3H", *COLOUR[3, 3]))
GAMMA = png_chunk(b"gAMA", struct.pack(">I", 100_000))
FLAT = np.full((SIDE, SIDE, 3), 77, np.uint8)
# (file, its levels, and by how many they may differ)
SEEN = {
    **{f"png gray {depth}": (png(bits(depth)[0], depth, 0), bits(depth)[1], 0) for depth in (1, 2, 4, 8)},
    "png gray 16": (png(DEEP, 16, 0), gray(HIGH), 0),
    "png gray 16 with a key": (png(DEEP, 16, 0, png_chunk(b"tRNS", b"\x20\x00")), gray(HIGH), 0),
    "png gray alpha 16": (png(deep(DEEP, DEEP[::-1]), 16, 4), gray(HIGH), 0),
    "png rgb 16": (png(deep(DEEP, DEEP.T, DEEP), 16, 2), deep(HIGH, HIGH.T, HIGH), 0),
    "png rgba 16": (png(deep(DEEP, DEEP.T, DEEP, DEEP // 3), 16, 6), deep(HIGH, HIGH.T, HIGH), 0),
    "png gray with a gamma": (png(GRAY, 8, 0, GAMMA), gray(GRAY), 0),
    "png rgb with a gamma": (png(COLOUR, 8, 2, GAMMA), COLOUR, 0),
    "png rgb with a key": (png(COLOUR, 8, 2, KEY), COLOUR, 0),
    "png palette": (*palette(), 0),
    "png palette with alphas": (*palette(bytes(range(0, 256, 8))), 0),
    "png palette with a key": (*palette(3), 0),
    "png rgba": (encode(see_through("RGB"), "PNG"), COLOUR, 0),
    "png gray alpha": (encode(see_through("L"), "PNG"), gray(FIRST.convert("L")), 0),
    "png animated": (encode(FIRST, "PNG", save_all=True, append_images=[SECOND]), COLOUR, 0),
    "webp": (encode(COLOUR, "WEBP", lossless=True), COLOUR, 0),
    "webp rgba": (encode(see_through("RGB"), "WEBP", lossless=True, exact=True), COLOUR, 0),
    "webp animated": (
        encode(FIRST, "WEBP", save_all=True, append_images=[SECOND], lossless=True, duration=9),
        COLOUR,
        0,
    ),
    "gif animated": (encode(Image.fromarray(FLAT), "GIF", save_all=True, append_images=[SECOND]), FLAT, 0),
    "jpeg gray": (encode(gray(GRAY)[..., 0], quality=100), gray(GRAY), 4),
    "jpeg rgb": (encode(COLOUR, quality=100, subsampling=0, keep_rgb=True), COLOUR, 4),
    "jpeg cmyk": (*cmyk(0), 8),
    "jpeg ycck": (*cmyk(2), 12),
    "jpeg 2000 gray 16": (encode(Image.fromarray(DEEP), "JPEG2000"), gray(HIGH), 1),
    "pgm 255": (b"P5\n%d %d\n255\n" % (SIDE, SIDE) + GRAY.tobytes(), gray(GRAY), 0),
    **{f"pgm {largest}": (*pgm(largest), 0) for largest in (1000, 4095, 65535)},
    "ppm 65535": (
        b"P6\n%d %d\n65535\n" % (SIDE, SIDE) + deep(DEEP, DEEP.T, DEEP).astype(">u2").tobytes(),
        deep(HIGH, HIGH.T, HIGH),
        1,
    ),
    "bmp": (encode(COLOUR, "BMP"), COLOUR, 0),
    **{f"tiff gray {order}16": (tiff(DEEP, 16, 1, order=order), gray(HIGH), 0) for order in "<>"},
    "tiff gray 16 white is zero": (tiff(65535 - DEEP, 16, 0), gray(HIGH), 0),
    "tiff gray 12": (tiff(np.uint16(DEEP >> 4), 12, 1), gray(HIGH), 0),
    "tiff gray 16 deflated": (encode(Image.fromarray(DEEP), "TIFF", compression="tiff_deflate"), gray(HIGH), 0),
    "tiff gray 8 white is zero": (tiff(255 - GRAY, 8, 0), gray(GRAY), 0),
    "tiff gray 4": (tiff(bits(4)[0], 4, 1), bits(4)[1], 0),
    "tiff rgb 16": (tiff(deep(DEEP, DEEP.T, DEEP), 16, 2), deep(HIGH, HIGH.T, HIGH), 0),
    "tiff rgb 16 and alpha": (
        tiff(deep(DEEP, DEEP.T, DEEP, DEEP // 3), 16, 2, extra=[2]),
        deep(HIGH, HIGH.T, HIGH),
        0,
    ),
    "tiff gray, premultiplied": (
        tiff(np.stack([GRAY // 2, np.full_like(GRAY, 128)], 2), 8, 1, extra=[1]),
        gray(GRAY),
        2,
    ),
    "tiff cmyk": (encode(FIRST.convert("CMYK"), "TIFF"), COLOUR, 0),
    "tiff lab": (tiff(np.stack([GRAY, GRAY * 0, GRAY * 0], 2), 8, 8), gray(GRAY), 14),  # L* of a gray
}
UNIT = RAMP.astype(np.float32)
ROUNDED = gray(np.rint(UNIT * 255))
SEEN |= {
    **{f"tiff float {order}32": (tiff(UNIT, 32, 1, sample_format=3, order=order), ROUNDED, 0) for order in "<>"},
    "tiff float 32 white is zero": (tiff(1 - UNIT, 32, 0, sample_format=3), ROUNDED, 1),
    "tiff float 32 deflated": (encode(Image.fromarray(UNIT), "TIFF", compression="tiff_deflate"), ROUNDED, 0),
    "pfm": (b"Pf\n%d %d\n-1.0\n" % (SIDE, SIDE) + UNIT[::-1].astype("<f4").tobytes(), ROUNDED, 0),
}
SIGNED, WIDE = "signed integers", "32-bit integers"
# Refused by the header,
REFUSED = {
    "tiff float 16": (tiff(RAMP.astype(np.float16), 16, 1, sample_format=3), "cannot identify"),
    "tiff signed 8": (tiff(GRAY.astype(np.int8), 8, 1, sample_format=2), SIGNED),
    "tiff signed 16": (tiff((DEEP // 2).astype(np.int16), 16, 1, sample_format=2), SIGNED),
    "tiff signed 32": (tiff(DEEP.astype(np.int32), 32, 1, sample_format=2), SIGNED),
    "tiff unsigned 32": (tiff(DEEP.astype(np.uint32), 32, 1), WIDE),
}
# and by the pixels only.
UNBOUNDED = {
    "levels": (UNIT * 255, r"numbers from \S+ to 255, not in \[0, 1\]"),
    "negative": (UNIT - 0.5, "numbers from -0.45 to 0.5, not in"),
    "not a number": (np.where(UNIT > 0.9, np.float32(np.nan), UNIT), "numbers from nan to nan, not in"),
}
FLOATS = {
    f"tiff float, {name}": (tiff(values, 32, 1, sample_format=3), reason)
    for name, (values, reason) in UNBOUNDED.items()
}


@pytest.mark.parametrize("name", sorted(SEEN))
def test_pixels_of_every_kind_become_their_levels(name):
    raw, expected, tolerance = SEEN[name]
    levels = decode_upright(raw, LIMIT)
    assert levels.dtype == np.uint8
    assert levels.shape == (SIDE, SIDE, 3)
    assert np.abs(levels - np.asarray(expected, np.float64)).max() <= tolerance
    encoded = inspect(raw, LIMIT)
    assert (encoded.width, encoded.height) == upright_size(raw) == (SIDE, SIDE)


@pytest.mark.parametrize("name", sorted(REFUSED | FLOATS))
def test_pixels_without_a_known_range_are_refused_in_one_line(name):
    raw, reason = (REFUSED | FLOATS)[name]
    by_header = (upright_size,) if name in REFUSED else ()
    for look in (*by_header, lambda raw: inspect(raw, LIMIT), lambda raw: decode_upright(raw, LIMIT)):
        with pytest.raises(BadSample, match=reason) as caught:
            look(raw)
        assert "\n" not in caught.value.reason


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Return a folder of all of them, numbered in order, and their names here."""
    folder = tmp_path_factory.mktemp("table")
    files = SEEN | REFUSED | FLOATS
    for number, (raw, *_) in enumerate(files.values()):
        (folder / f"{number:03d}.png").write_bytes(raw)
    return folder, list(files)


def test_verify_and_clean_views_agree_with_the_table(table):
    """Files of S × S seen at S × S: DALI returns what Pillow decodes, whichever of them decoded it."""
    folder, names = table
    usable = [name in SEEN for name in names]
    bad = {one["file"] for one in verify(folder, threads=1)["bad"]}
    assert bad == {str(folder / f"{number:03d}.png") for number, good in enumerate(usable) if not good}
    images = list_images(folder)
    (clean,) = load_clean(images, SIDE, threads=1, batch=len(images))
    assert clean.rows.tolist() == np.flatnonzero(usable).tolist()
    for row, shown in zip(clean.rows.tolist(), clean.images.numpy(), strict=True):
        assert np.array_equal(shown, decode_upright(images.read(row), LIMIT)), row


def test_an_index_knows_no_size_of_what_its_header_rules_out(table):
    folder, names = table
    out = folder.parent / "index.tsv"
    write_index(folder, out)
    sizes = [line.split("\t")[2:4] for line in out.read_text().splitlines() if ".png\t" in line]
    assert sizes == [["0", "0"] if name in REFUSED else [str(SIDE), str(SIDE)] for name in names]


def test_images_made_in_memory_are_seen_as_their_files_would_be():
    assert np.array_equal(upright_rgb(Image.fromarray(DEEP)), gray(HIGH))
    assert np.array_equal(upright_rgb(Image.fromarray(UNIT)), ROUNDED)
    for values, reason in ((UNIT * 2, "floating-point numbers"), (DEEP.astype(np.int32), WIDE)):
        with pytest.raises(ValueError, match=reason):
            upright_rgb(Image.fromarray(values))


# Places other than before its pixels where a file may state its orientation.
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
BLOCK = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
OBLONG = picture(33, 21)
PLAIN = png(OBLONG, 8, 2)
TEXTS = {
    "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "exif": png_chunk(b"eXIf", BLOCK),
    "a text": png_chunk(
        b"tEXt",
        b"Raw profile type exif\0\nexif\n%8d\n" % (len(BLOCK) + 6) + (b"Exif\0\0" + BLOCK).hex().encode() + b"\n",
    ),
}
TURNED = {
    **{f"png, {name} before the pixels": png(OBLONG, 8, 2, chunk) for name, chunk in TEXTS.items()},
    **{f"png, {name} behind the pixels": PLAIN[:-12] + chunk + PLAIN[-12:] for name, chunk in TEXTS.items()},
    "tiff": turned(OBLONG, 6, "TIFF"),
    "tiff, xmp": encode(OBLONG, "TIFF", tiffinfo={700: XMP}),
    "tiff, xmp too": encode(OBLONG, "TIFF", tiffinfo={700: XMP, 274: 6}),
    "tiff of 16 bits": encode(
        Image.fromarray(OBLONG[..., 0].astype(np.uint16) * 257), "TIFF", tiffinfo={274: 6}, compression="tiff_lzw"
    ),
    "webp": turned(OBLONG, 6, "WEBP"),
}


@pytest.mark.parametrize("name", sorted(TURNED))
def test_a_turned_file_is_upright_wherever_it_says_so(name):
    upright = np.rot90(gray(OBLONG[..., 0]) if "16" in name else OBLONG, -1)
    raw = TURNED[name]
    assert np.array_equal(decode_upright(raw, LIMIT), upright)
    encoded = inspect(raw, LIMIT)
    assert (encoded.width, encoded.height) == upright_size(raw) == upright.shape[1::-1]
    assert encoded.lossless  # what DALI would show lies on its side
    assert np.array_equal(np.frombuffer(encoded.data.tobytes()[-upright.size :], np.uint8), upright.ravel())


def test_text_that_says_nothing_of_a_turn_leaves_a_png_to_dali():
    raw = PLAIN[:-12] + png_chunk(b"tEXt", b"date:create\0today") + PLAIN[-12:]
    assert not inspect(raw, LIMIT).lossless
