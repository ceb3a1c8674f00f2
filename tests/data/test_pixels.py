"""Files of every mode and depth become the 8-bit grey values that a viewer shows."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.image_bytes import png, tiff

from lightkit.data.image_files import read_image
from lightkit.data.pixels import Depth, to_pixels
from lightkit.errors import DataError

DEEP = np.array([[0, 255, 256, 32768, 65535]])
SHIFTED = [[0, 0, 1, 128, 255]]

# A row of eight pixels without ink and eight of black.
BLACK_HALF = [[0] * 4] * 8 + [[0, 0, 0, 255]] * 8


def saved(values, format, mode=None, **options):
    """Returns a file with the array ``values``."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(values), mode).save(file, format, **options)
    return file.getvalue()


def read(tmp_path, content):
    """Returns the pixels of a file with this content, neither scaled nor inverted, and nothing else of it."""
    path = tmp_path / "image.any"
    path.write_bytes(content)
    with Image.open(path) as image:
        size = (image.height, image.width)
    return read_image(path, size).tolist()


@pytest.mark.parametrize(
    "content",
    [
        saved(DEEP.astype("uint16"), "PNG"),
        saved(DEEP.astype("uint16"), "TIFF"),
        saved(DEEP.astype("uint16"), "TIFF", compression="tiff_lzw"),
        saved(DEEP.astype(">u2"), "TIFF"),
        saved(DEEP.astype("int32"), "TIFF"),
        tiff(5, 1, 16, 0, (65535 - DEEP).astype("<u2").tobytes()),
        png(5, 1, 16, 4, np.stack([DEEP, DEEP * 0 + 65535], axis=2).astype(">u2").tobytes()),
        png(5, 1, 16, 2, np.stack([DEEP] * 3, axis=2).astype(">u2").tobytes()),
        png(5, 1, 16, 6, np.stack([DEEP] * 3 + [DEEP * 0 + 65535], axis=2).astype(">u2").tobytes()),
    ],
    ids=["png", "tiff", "lzw", "big-endian", "32 bits", "0 is white", "grey+alpha", "rgb", "rgba"],
)
def test_16_bits_lose_the_lower_8(tmp_path, content):
    """A scan of 16 bits keeps its shades: clipped at 255 it would be white."""
    assert read(tmp_path, content) == SHIFTED


def test_12_bits_lose_the_lower_4(tmp_path):
    """A TIFF file with 12 bits is as bright as it says: two pixels take three bytes."""
    assert read(tmp_path, tiff(4, 1, 12, 1, bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF]))) == [[0, 1, 128, 255]]


def test_signed_16_bits(tmp_path):
    """Signed values are taken as they are, if none is negative."""
    assert read(tmp_path, tiff(2, 1, 16, 1, struct.pack("<hh", 0, 32767), 2)) == [[0, 127]]
    with pytest.raises(DataError, match=r"has 16-bit values from -1 to 5 \(mode I\); expected values from 0 to 65535"):
        read(tmp_path, tiff(2, 1, 16, 1, struct.pack("<hh", -1, 5), 2))


@pytest.mark.parametrize(("photometric", "expected"), [(1, [[0, 26, 64, 128, 255]]), (0, [[255, 229, 191, 127, 0]])])
def test_floats_from_0_to_1(tmp_path, photometric, expected):
    """Floats become 255 v, rounded, also where 0 is white."""
    content = tiff(5, 1, 32, photometric, np.array([0, 0.1, 0.25, 0.5, 1], "<f4").tobytes(), 3)
    assert read(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([0, 1.5], "float32", r"has floating-point values from 0 to 1.5 \(mode F\); expected values from 0 to 1$"),
        ([-0.5, 1], "float32", r"has .* from -0.5 to 1 \(mode F\)"),
        ([0, 255], "float32", r"has .* from 0 to 255 \(mode F\)"),
        ([0, np.nan], "float32", r"has values that are not finite \(mode F\)"),
        ([np.nan, 0], "float32", r"has values that are not finite \(mode F\)"),
        ([0, np.inf], "float32", r"has values that are not finite \(mode F\)"),
        ([-1, 5], "int32", r"has 32-bit values from -1 to 5 \(mode I\); expected values from 0 to 65535$"),
        ([0, 65536], "int32", r"has .* from 0 to 65536 \(mode I\)"),
        ([0, 200], "int32", r"has .* from 0 to 200 \(mode I\), which may stand for grey of 8 or of 16 bits: save it"),
    ],
)
def test_other_ranges(tmp_path, values, kind, message):
    """One line has the mode and the range of values that have no certain meaning."""
    with pytest.raises(DataError, match=rf"^\S*image\.any {message}") as error:
        read(tmp_path, saved(np.array([values], kind), "TIFF"))
    assert "\n" not in str(error.value)


def test_dark_16_bits_are_no_8_bits(tmp_path):
    """The values of a file have one meaning, however dark it is; the warning says why it looks blank."""
    with pytest.warns(UserWarning, match=r"^1 image blank or nearly so, .*image\.any \(16-bit values from 0 to 255\)$"):
        assert read(tmp_path, saved(np.array([[0, 255]], "uint16"), "PNG")) == [[0, 0]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(8, 1, 1, 0, bytes([0b10101010])), [[255, 0] * 4]),
        (saved(np.array([[True, False, True]]), "TIFF"), [[255, 0, 255]]),
        (png(4, 1, 2, 0, bytes([0b00011011])), [[0, 85, 170, 255]]),
        (png(2, 1, 4, 0, bytes([0x1F])), [[17, 255]]),
        (saved(np.array([[0, 100, 255]], "uint8"), "BMP"), [[0, 100, 255]]),
        (saved(np.array([[0, 100, 255]], "uint8"), "GIF"), [[0, 100, 255]]),
        (saved(np.array([[[0] * 3, [100] * 3, [255] * 3]], "uint8"), "WEBP", lossless=True), [[0, 100, 255]]),
        (saved(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], "uint8"), "PNG"), [[76, 150, 29]]),
        (png(2, 1, 8, 3, bytes([1, 0]), {b"PLTE": bytes([9, 9, 9, 255, 0, 0])}), [[76, 9]]),
        (saved(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], "uint8"), "TIFF", "CMYK"), [[255, 179, 0]]),
        (
            saved(np.array([[[0] * 4] * 8 + [[0, 0, 0, 255]] * 8] * 8, "uint8"), "JPEG", "CMYK"),
            [[255] * 8 + [0] * 8] * 8,
        ),
        (saved(np.array([[[0, 0, 0], [255, 0, 0]]], "uint8"), "TIFF", "LAB"), [[0, 255]]),
    ],
    ids=["1", "1 tiff", "2", "4", "bmp", "gif", "webp", "rgb", "palette", "cmyk", "cmyk jpeg", "lab"],
)
def test_other_modes(tmp_path, content, expected):
    """Colours become their luma; a few bits become the whole range."""
    assert read(tmp_path, content) == expected


@pytest.mark.filterwarnings("ignore:1 image blank")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # The key of a transparent colour has the depth of the file, whatever the depth that Pillow decodes to.
        (png(3, 1, 16, 0, np.array([9, 0, 65535], ">u2").tobytes(), {b"tRNS": struct.pack(">H", 9)}), [[255, 0, 255]]),
        (png(4, 1, 2, 0, bytes([0b00011011]), {b"tRNS": struct.pack(">H", 1)}), [[0, 255, 170, 255]]),
        (png(2, 1, 4, 0, bytes([0x0F]), {b"tRNS": struct.pack(">H", 15)}), [[0, 255]]),
        (png(2, 1, 4, 0, bytes([0x2F]), {b"tRNS": struct.pack(">H", 2)}), [[0, 255]]),
        (png(8, 1, 1, 0, bytes([0b00001111]), {b"tRNS": struct.pack(">H", 0)}), [[0] * 4 + [255] * 4]),
        (png(2, 1, 8, 0, bytes([7, 9]), {b"tRNS": struct.pack(">H", 7)}), [[255, 9]]),
        (png(2, 1, 8, 2, bytes([7, 7, 7, 9, 9, 9]), {b"tRNS": struct.pack(">HHH", 7, 7, 7)}), [[255, 9]]),
        (
            png(2, 1, 16, 2, np.array([[0x1234] * 3, [0x0900] * 3], ">u2").tobytes(), {b"tRNS": b"\x12\x34" * 3}),
            [[255, 9]],
        ),
        (
            png(3, 1, 8, 3, bytes([0, 1, 2]), {b"PLTE": bytes([0] * 3 + [9] * 3 + [99] * 3), b"tRNS": b"\xff\x00"}),
            [[0, 255, 99]],
        ),
        (
            png(3, 1, 8, 3, bytes([0, 1, 2]), {b"PLTE": bytes([0] * 3 + [9] * 3 + [99] * 3), b"tRNS": b"\xff\x80"}),
            [[0, 132, 99]],
        ),
        (saved(np.array([[[0, 255], [0, 0], [50, 255], [0, 128]]], "uint8"), "PNG"), [[0, 255, 50, 127]]),
        (saved(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], "uint8"), "TIFF"), [[0, 255]]),
        (saved(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], "uint8"), "WEBP", lossless=True), [[0, 255]]),
        (saved(np.array([[0, 1]], "uint8"), "GIF", transparency=1), [[0, 255]]),
    ],
    ids="16 2 4 4low 1 8 rgb rgb16 palette palette-half la tiff webp gif".split(),
)
def test_transparent_pixels(tmp_path, content, expected):
    """Dark ink lies on white, of every way in which a file says what is transparent."""
    assert read(tmp_path, content) == expected


def rgba(grey, alpha):
    """Returns a PNG file of grey values and opacities, lists of equal length, in one row."""
    return saved(np.array([[[g, g, g, a] for g, a in zip(grey, alpha, strict=True)]], "uint8"), "PNG")


@pytest.mark.parametrize(
    ("grey", "alpha", "expected"),
    [
        ([255, 0, 255], [255, 0, 0], [255, 0, 0]),  # white ink: black ground
        ([255, 0, 0], [255, 0, 0], [255, 0, 0]),  # whatever the colour of what is not seen
        ([200, 9, 160], [255, 0, 255], [200, 0, 160]),  # bright ink
        ([255, 255, 255], [255, 128, 0], [255, 128, 0]),  # white ink with soft edges
        ([0, 0, 255], [255, 0, 0], [0, 255, 255]),  # black ink: white ground
        ([0, 0], [60, 0], [195, 255]),  # thin black ink, which is bright on white
        ([255, 20, 255], [255, 255, 0], [255, 20, 255]),  # paper with ink and a transparent margin
        ([255, 0, 9], [255, 255, 255], [255, 0, 9]),  # opaque
    ],
)
def test_the_ground_shows_the_ink(tmp_path, grey, alpha, expected):
    """No picture is blank because of what it is laid on."""
    assert read(tmp_path, rgba(grey, alpha)) == [expected]


def test_transparent_alone_is_blank(tmp_path):
    """A picture without any ink is white, and a warning says that it is blank."""
    with pytest.warns(UserWarning, match="1 image blank or nearly so"):
        assert read(tmp_path, rgba([7, 200], [0, 0])) == [[255, 255]]


@given(
    ink=st.integers(0, 255),
    alphas=st.lists(st.sampled_from([0, 0, 255]), min_size=2, max_size=9).filter(lambda a: len(set(a)) > 1),
)
def test_ink_never_vanishes(ink, alphas):
    """Opaque ink of any one shade on nothing has a contrast of half the range at least."""
    image = Image.fromarray(np.array([[[ink, ink, ink, alpha] for alpha in alphas]], "uint8"))
    pixels = to_pixels(image, "image", Depth()).values
    assert np.ptp(pixels) >= 127
    inked = pixels[0][np.array(alphas) == 255]
    assert (inked == ink).all()


def test_strips_make_no_seam(monkeypatch):
    """An image that is converted in several strips is what it is as one."""
    noise = torch.randint(0, 256, (9, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    deep = (noise[:, :, 0].astype("uint16") << 8) + noise[:, :, 1]
    images = [Image.fromarray(noise), Image.fromarray(deep), Image.fromarray(noise[:, :, 0] / np.float32(255))]
    whole = [to_pixels(image, "image", Depth()).values for image in images]
    monkeypatch.setattr("lightkit.data.pixels._STRIP", 10)
    for image, expected in zip(images, whole, strict=True):
        np.testing.assert_array_equal(to_pixels(image, "image", Depth()).values, expected)
