from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import encode, picture, turned
from PIL import Image

from iwm_fast.data.decode.encoded import BadSample, decode_upright, inspect
from iwm_fast.data.decode.structure import plain_jpeg, plain_png

LIMIT = 10**7
IMAGE = picture(33, 21)
JPEG = encode(IMAGE)
PNG = encode(IMAGE, "PNG")


def pixels(encoded):
    """Return the pixels of a lossless one: an uncompressed PNM."""
    header, image = encoded.data.tobytes().split(b"255\n", 1)
    assert header == b"P6\n%d %d\n" % (encoded.width, encoded.height)
    return np.frombuffer(image, np.uint8).reshape(encoded.height, encoded.width, 3)


def test_no_other_program_draws_a_file_and_a_decoder_that_gives_up_makes_it_bad(monkeypatch):
    """PostScript under an image's name would start Ghostscript; of DDS Pillow decodes some kinds only."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    dds = b"DDS " + struct.pack("<7I", 124, 0x1007, 4, 4, 0, 0, 0) + bytes(44)
    dds += struct.pack("<2I4s5I", 32, 4, b"ABCD", 0, 0, 0, 0, 0) + bytes(20 + 64)
    for raw in (script, dds):
        for read in (inspect, decode_upright):
            with pytest.raises(BadSample):
                read(raw, LIMIT)


def test_the_limit_of_pixels_is_the_configuration_s(monkeypatch):
    """A header of 20,000 x 20,000 pixels, above Pillow's own limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
    data = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(data)) + b"IHDR" + data + struct.pack(">I", zlib.crc32(b"IHDR" + data))
    raw = PNG[:8] + chunk + PNG[33:]
    with pytest.raises(BadSample, match=r"more than twice data\.max_pixels \(178956970\)"):
        decode_upright(raw, 178_956_970)
    with pytest.raises(BadSample, match=r"20000 x 20000 pixels: more than data\.max_pixels \(300000000\)"):
        decode_upright(raw, 300_000_000)


@pytest.mark.parametrize(
    "raw",
    [
        JPEG,
        encode(IMAGE, progressive=True),
        encode(IMAGE, subsampling=0),
        encode(Image.fromarray(IMAGE).convert("L")),
        turned(IMAGE, 1),
        PNG,
        encode(Image.fromarray(IMAGE).convert("L"), "PNG"),
    ],
    ids=["jpeg", "progressive", "444", "gray", "orientation 1", "png", "gray png"],
)
def test_plain_files_pass_as_they_are(raw):
    encoded = inspect(raw, LIMIT)
    assert encoded.data.tobytes() == raw
    assert (encoded.width, encoded.height, encoded.lossless) == (33, 21, False)


def without_adobe(raw):
    """Return a JPEG without Adobe's marker."""
    at = raw.index(b"\xff\xee")
    return raw[:at] + raw[at + 2 + int.from_bytes(raw[at + 2 : at + 4], "big") :]


ODD = {
    "cmyk": encode(Image.fromarray(IMAGE).convert("CMYK")),
    "palette": encode(Image.fromarray(IMAGE).quantize(16), "PNG"),
    "alpha": encode(Image.fromarray(IMAGE).convert("RGBA"), "PNG"),
    "16 bits": encode(Image.fromarray(IMAGE[..., 0].astype(np.uint16) * 257), "PNG"),
    "black and white": encode(Image.fromarray(IMAGE).convert("1"), "PNG"),
    "webp": encode(IMAGE, "WEBP", lossless=True),
    "bmp": encode(IMAGE, "BMP"),
    "turned png": turned(IMAGE, 5, "PNG"),
    "turned webp": turned(IMAGE, 8, "WEBP"),
    "rgb jpeg": encode(IMAGE, keep_rgb=True, subsampling=0),
    "rgb jpeg by its components' names": without_adobe(encode(IMAGE, keep_rgb=True, subsampling=0)),
    "trailing bytes": JPEG + b"\0\0",
    "fill bytes": JPEG[:2] + b"\xff" + JPEG[2:],
}


@pytest.mark.parametrize("kind", sorted(ODD))
def test_odd_files_are_handed_on_as_pillow_decodes_them(kind):
    encoded = inspect(ODD[kind], LIMIT)
    assert encoded.lossless
    assert np.array_equal(pixels(encoded), decode_upright(ODD[kind], LIMIT))
    assert (encoded.width, encoded.height) == ((21, 33) if kind.startswith("turned") else (33, 21))


def exif_block(*entries, order="<", first=8, end=b"\0\0\0\0"):
    """Return an APP1 segment whose first directory has these entries (tag, type, count, value)."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    fields = b"".join(
        struct.pack(order + "HHI", *entry[:3]) + struct.pack(order + "HH", entry[3], 0) for entry in entries
    )
    tiff = mark + struct.pack(order + "I", first) + struct.pack(order + "H", len(entries)) + fields + end
    body = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def with_segments(*segments):
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


@pytest.mark.parametrize("order", ["<", ">"], ids=["little endian", "big endian"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_jpeg_goes_with_its_own_bytes(orientation, order):
    raw = with_segments(exif_block((0x010F, 2, 1, 65), (0x0112, 3, 1, orientation), order=order))
    encoded = inspect(raw, LIMIT)
    assert encoded.data.tobytes() == raw
    assert (encoded.orientation, encoded.lossless) == (orientation, False)
    assert (encoded.height, encoded.width) == decode_upright(raw, LIMIT).shape[:2]


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
TURNED = (0x0112, 3, 1, 6)
UNUSUAL_EXIF = {
    "orientation as a long": with_segments(exif_block((0x0112, 4, 1, 6))),
    "two orientations": with_segments(exif_block(TURNED, (0x0112, 3, 1, 8))),
    "two of one orientation": with_segments(exif_block(TURNED, (0x0112, 3, 2, 6))),
    "two blocks": with_segments(exif_block(TURNED), exif_block((0x0112, 3, 1, 8))),
    "cut off after the entries": with_segments(exif_block(TURNED, end=b"")),
    "directory beyond the end": with_segments(exif_block(TURNED, first=900)),
    "said by XMP": with_segments(b"\xff\xe1" + struct.pack(">H", len(XMP) + 2) + XMP),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", sorted(UNUSUAL_EXIF))
def test_an_unusual_exif_block_is_left_to_pillow(kind):
    """Unless Pillow finds no orientation in it: then it is treated as having none."""
    raw = UNUSUAL_EXIF[kind]
    encoded, upright = inspect(raw, LIMIT), decode_upright(raw, LIMIT)
    assert encoded.orientation == 1
    assert (encoded.height, encoded.width) == upright.shape[:2]
    if encoded.lossless:
        assert np.array_equal(pixels(encoded), upright)
    else:
        assert np.array_equal(upright, decode_upright(JPEG, LIMIT))


def png_chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_pillows_orientations_turn_the_pixels_upright():
    upright = decode_upright(turned(IMAGE, 6, "PNG"), LIMIT)
    assert np.array_equal(upright, np.rot90(IMAGE, -1))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "identify"),
        (b"hello, this is text", "identify"),
        (bytes(300), "identify"),
        (JPEG[:20], "identify|[Tt]runcated"),
        (JPEG[: len(JPEG) // 2], "[Tt]runcated"),
        (JPEG[:-30], "truncated"),
        (PNG[: len(PNG) // 2], "[Tt]runcated"),
    ],
    ids=["empty", "text", "zeros", "header", "half", "nearly", "half png"],
)
def test_what_pillow_refuses_is_refused_in_one_line(raw, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        inspect(raw, LIMIT)
    assert "\n" not in caught.value.reason


def test_too_many_pixels_are_refused_before_they_are_decoded():
    with pytest.raises(BadSample, match=r"33 x 21 pixels: more than data.max_pixels \(600\)"):
        inspect(JPEG, 600)


def test_a_bomb_is_refused():
    """Three lines of PNG that claim 400 megapixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND")
    with pytest.raises(BadSample, match="pixels"):
        inspect(bomb, 178_956_970)


def test_png_damage_is_seen_by_its_checksums():
    assert plain_png(PNG)
    for at in (40, len(PNG) // 2, len(PNG) - 20):
        assert not plain_png(PNG[:at] + bytes([PNG[at] ^ 1]) + PNG[at + 1 :])


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 700), new=st.binary(min_size=0, max_size=8), cut=st.integers(0, 8))
def test_damaged_headers_are_never_a_surprise(at, new, cut):
    """Whatever is written over a header: plain, decoded by Pillow, or a BadSample; never another exception."""
    raw = JPEG[:at] + new + JPEG[at + cut :]
    try:
        encoded = inspect(raw, LIMIT)
    except BadSample:
        return
    assert encoded.lossless or plain_jpeg(raw)
    assert encoded.width * encoded.height <= LIMIT
