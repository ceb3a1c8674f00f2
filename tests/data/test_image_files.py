"""Image files are read as images of the kind that the model was trained on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from side_effects import watched
from support.image_bytes import png

from lightkit._util import regular_files
from lightkit.data import image_decoder, image_walk
from lightkit.data.image_files import ImageFormat, find_images, read_image, read_images
from lightkit.errors import DataError


@pytest.fixture
def digit():
    """Returns a bright stroke on black, 28x28."""
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[4:24, 12:16] = 255
    return image


def test_own_size_is_kept(tmp_path, digit):
    """An image of the model's size keeps its pixels, whatever its border."""
    for name, pixels in (("dark", digit), ("bright", 255 - digit)):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
        assert torch.equal(read_image(tmp_path / f"{name}.png", 28), pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_scan_is_scaled_and_inverted(tmp_path, digit, suffix, mode):
    """Dark ink on bright paper, larger and not square, becomes light on dark of the model's size."""
    scan = Image.fromarray((255 - digit).numpy()).convert(mode).resize((200, 280))
    path = tmp_path / f"scan.{suffix}"
    scan.save(path)
    pixels = read_image(path, 28).float()
    assert pixels[:, :4].mean() < 10 and pixels[8:20, 13:15].mean() > 200
    assert read_image(path, 28, invert=False).float()[:, :4].mean() > 245


def test_transparent_background_is_white(tmp_path, digit):
    """Black ink on a transparent background stays visible."""
    ink = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (24, 8, 32, 48))
    ink.save(tmp_path / "ink.png")
    pixels = read_image(tmp_path / "ink.png", 28).float()
    assert pixels[:, :4].mean() < 10 and pixels[8:20, 13:15].mean() > 200


def test_scale_and_ground(tmp_path):
    """An image of another shape is scaled to fit into the middle; the rest has the grey of its border."""
    Image.fromarray(np.full((10, 40), 60, np.uint8)).save(tmp_path / "wide.png")
    with pytest.warns(UserWarning, match="1 image blank or nearly so"):
        assert read_image(tmp_path / "wide.png", 28).tolist() == [[60] * 28] * 28
    Image.fromarray(np.array([[0] * 8 + [200] * 8] * 4, np.uint8)).save(tmp_path / "halves.png")
    pixels = read_image(tmp_path / "halves.png", (8, 16), invert=True)
    assert pixels.shape == (8, 16)
    # Two rows above, then the image, inverted; its border is 255 in one half and 55 in the other.
    assert pixels[:2].tolist() == pixels[6:].tolist() == [[155] * 16] * 2
    assert pixels[2:6].tolist() == [[255] * 8 + [55] * 8] * 4


def test_thin_image(tmp_path):
    """An image that is far longer than wide keeps one pixel at least."""
    Image.fromarray(np.array([[0]] * 2500 + [[255]] * 2500, np.uint8)).save(tmp_path / "line.png")
    pixels = read_image(tmp_path / "line.png", 28, invert=False)
    assert pixels[:13, 14].max() < 10 and pixels[15:, 14].min() > 245


UPRIGHT = np.arange(10, 130, 10, dtype=np.uint8).reshape(3, 4)

# How a camera that was held so stores the scene: EXIF says which row and column of the file are top and left.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: np.rot90(UPRIGHT, 2).T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *(("png", kind) for kind in ("grey", "16 bits", "alpha", "palette")),
        *(("tif", kind) for kind in ("grey", "16 bits", "alpha", "palette")),
        *(("webp", kind) for kind in ("grey", "alpha")),
        ("jpg", "grey"),
    ],
)
def test_every_orientation(tmp_path, orientation, suffix, kind):
    """The image is turned as its EXIF data say, transparent or not, in every format."""
    stored = np.ascontiguousarray(STORED[orientation])
    options = {"lossless": True} if suffix == "webp" else {}
    if suffix == "jpg":
        # Blocks of equal pixels survive the compression; the reader scales them back.
        stored, options = stored.repeat(8, axis=0).repeat(8, axis=1), {"quality": 100}
    image = Image.fromarray(stored.astype(np.uint16) << 8) if kind == "16 bits" else Image.fromarray(stored)
    expected = UPRIGHT
    if kind == "alpha":
        image.putalpha(Image.fromarray(np.where(stored == 40, 0, 255).astype(np.uint8)))
    if kind == "palette":
        image = Image.frombytes("P", image.size, stored.tobytes())
        image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
        options |= {"transparency": 40} if suffix == "png" else {}
    if kind == "alpha" or "transparency" in options:
        # What is transparent lies on white.
        expected = np.where(UPRIGHT == 40, 255, UPRIGHT)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / f"image.{suffix}", exif=exif, **options)
    if suffix == "jpg":
        pixels = read_image(tmp_path / "image.jpg", (24, 32))[4::8, 4::8]
        assert np.abs(pixels.numpy().astype(int) - expected).max() <= 1
    else:
        assert read_image(tmp_path / f"image.{suffix}", (3, 4)).tolist() == expected.tolist()


def test_folder(tmp_path, digit):
    """A folder yields its images sorted by name, in every format and spelling of the suffix, and no line."""
    names = ["a.jpg", "b.png", "c.TIF", "d.tiff", "e.WebP", "f.bmp", "g.GIF", "h.JPEG", "i.jfif"]
    for name in reversed(names):
        Image.fromarray(digit.numpy()).save(tmp_path / name, "JPEG" if name == "i.jfif" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = find_images(tmp_path)
        kept, pixels, _ = read_images(paths, ImageFormat((28, 28)))
    assert [p.name for p in paths] == names and kept == paths and pixels.shape == (9, 28, 28)


def test_litter_is_skipped(tmp_path, digit):
    """One line counts and names what is no image; it costs no prediction."""
    Image.fromarray(digit.numpy()).save(tmp_path / "a.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", "README.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    with pytest.warns(UserWarning) as caught:
        assert [p.name for p in find_images(tmp_path)] == ["a.png"]
    (line,) = (str(warning.message) for warning in caught)
    assert line == f"{tmp_path}: skipped 6 entries that are no images: .DS_Store, ._a.png, README.txt and 3 more"


def test_folder_without_images(tmp_path):
    """The error names what the folder holds instead."""
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=r"holds no images \(PNG, .* or GIF\), only readme\.txt$"):
        find_images(tmp_path)


def test_unreadable_images_of_a_folder(tmp_path, digit):
    """One line names each image that cannot be read, and why; the others keep their order."""
    for name in ("a.png", "c.png"):
        Image.fromarray(digit.numpy()).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "d.png").write_bytes(b"")
    paths = find_images(tmp_path)
    with pytest.warns(UserWarning) as caught:
        kept, pixels, problems = read_images(paths, ImageFormat((28, 28)))
    assert [path.name for path in problems] == ["b.png", "d.png"]
    (line,) = (str(warning.message) for warning in caught)
    assert line.startswith("skipped 2 of 4 images: ") and "b.png is a damaged image" in line
    assert line.endswith("d.png is empty (0 bytes)")
    assert [p.name for p in kept] == ["a.png", "c.png"] and torch.equal(pixels, torch.stack([digit, digit]))
    with pytest.raises(DataError, match=r"b\.png is a damaged image: .*; and 1 more cannot be read$"):
        read_images([tmp_path / "b.png", tmp_path / "d.png"], ImageFormat((28, 28)))


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_first_of_several_frames(tmp_path, suffix):
    """The first frame or page is read, and one line says that there are more."""
    frames = [Image.fromarray(np.array([[0, value]], np.uint8)) for value in (200, 100)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=rf"^the first frame or page is read of 1 image with several: .*a\.{suffix}$"):
        assert read_image(tmp_path / f"a.{suffix}", (1, 2)).tolist() == [[0, 200]]


@pytest.mark.parametrize("content", [b"this is text", b"\x89PNG\r\n\x1a\n" + b"\x00" * 30])
def test_not_an_image(tmp_path, content):
    """The error names a text file called .png, and a damaged one."""
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png is (not an image|a damaged image)"):
        read_image(tmp_path / "x.png", 28)


def test_truncated_image(tmp_path, digit):
    """Half a file is an error."""
    path = tmp_path / "half.jpg"
    Image.effect_noise((300, 300), 90).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match="damaged image"):
        read_image(path, 28)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_damaged_bytes(tmp_path, suffix):
    """Whatever the bytes of a file are, the reader returns pixels or its own error."""
    random = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(150):
        damaged = whole.copy()
        damaged[random.integers(0, min(len(whole), 400), 4)] = random.integers(0, 256, 4)
        path.write_bytes(damaged[: random.choice([len(whole), random.integers(1, len(whole))])].tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_image(path, 28).shape == (28, 28)
            except DataError as error:
                assert str(path) in str(error)


def test_nothing_there(tmp_path):
    """The error says that a path does not exist or that a folder is empty."""
    with pytest.raises(DataError, match=r"input=.*in does not exist$"):
        find_images(tmp_path / "in")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"holds no images \(PNG, JPEG, TIFF, WebP, BMP or GIF\)$"):
        find_images(tmp_path / "in")


def test_dangling_links(tmp_path, digit):
    """One warning names the links and pipes of a folder and their kinds; as the input they are an error."""
    Image.fromarray(digit.numpy()).save(tmp_path / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    kinds = r"circle\.png \(a broken link\), .*dangling\.png \(a broken link\), .*pipe\.png \(a pipe\)$"
    with pytest.warns(UserWarning, match=rf"skipped, .*{kinds}"):
        assert [p.name for p in find_images(tmp_path)] == ["a.png"]
    with pytest.raises(DataError, match=r"input=.*pipe\.png is a pipe, and must be a regular file"):
        find_images(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"input=.*dangling\.png does not exist: it is a broken link to .*nowhere$"):
        find_images(tmp_path / "dangling.png")
    with pytest.raises(DataError, match=r"input=.*circle\.png cannot be read: Too many levels of symbolic links"):
        find_images(tmp_path / "circle.png")
    with pytest.raises(DataError, match=r"is a device, and must be a regular file"):
        find_images(Path("/dev/zero"))


def test_permission_denied(tmp_path, digit, monkeypatch):
    """A file or a folder that may not be read is named as such; root may read all, so that the system call is faked."""
    Image.fromarray(digit.numpy()).save(tmp_path / "a.png")

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(regular_files.os, "open", refuse)
        with pytest.raises(DataError, match=r"a\.png cannot be read: Permission denied"):
            read_image(tmp_path / "a.png", 28)
    monkeypatch.setattr(image_walk.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"^\S+ cannot be read: Permission denied"):
        find_images(tmp_path)


def test_no_program_is_started_for_an_image(tmp_path):
    """Pillow would start Ghostscript for PostScript, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\nshowpage\n")
    with watched() as acts, pytest.raises(DataError, match="is not an image"):
        read_image(tmp_path / "a.png", 28)
    assert not [act for act in acts if act.startswith(("subprocess", "os.posix_spawn", "os.exec"))]


def test_a_scan_of_200_megapixels(tmp_path):
    """A large scan is read, although Pillow takes it for an attack: black on white, of 201 million pixels."""
    row, inked = bytes([255] * 1875), bytes([255] * 750 + [0] * 375 + [255] * 750)
    (tmp_path / "scan.png").write_bytes(png(15_000, 13_400, 1, 0, row * 3350 + inked * 6700 + row * 3350))
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "scan.png", 28)
    assert pixels[:6].max() == 0 and pixels[9:19, 13:15].min() > 240
    assert Image.MAX_IMAGE_PIXELS == limit


def test_a_large_photograph_is_scaled_while_it_is_decoded(tmp_path, monkeypatch):
    """The result of a JPEG file that is decoded smaller is that of the whole one, except for rounding."""
    y, x = np.mgrid[:1100, :1500]
    Image.fromarray((127 + 100 * np.sin(x / 200) * np.cos(y / 150)).astype(np.uint8)).save(tmp_path / "a.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(image_decoder, "_LARGE", 10_000_000)
        whole = read_image(tmp_path / "a.jpg", 28, invert=False).int()
    seen = []
    convert = image_decoder.to_pixels
    monkeypatch.setattr(image_decoder, "to_pixels", lambda image, *a: seen.append(image.size) or convert(image, *a))
    assert (read_image(tmp_path / "a.jpg", 28, invert=False).int() - whole).abs().max() <= 2
    assert seen == [(188, 138)]


@pytest.mark.parametrize(
    ("size", "row", "message"),
    [
        ((50_000, 50_000), b"", r"is too large: it has 50000 x 50000 pixels; the limits are 250,000,000 pixels"),
        ((2_000_000, 1), bytes(250_000), r"is too large: it has 2000000 x 1 pixels; .* sides of 1,048,576"),
        ((12_000, 11_000), b"", r"is truncated: it has 12000 x 11000 pixels, for which its 65 bytes are too few"),
    ],
)
def test_images_beyond_the_limits(tmp_path, size, row, message, monkeypatch):
    """A small file may declare any number of pixels: its header is checked before anything takes memory."""
    (tmp_path / "large.png").write_bytes(png(*size, 1, 0, row))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("memory was taken"))
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / "large.png", 28)
