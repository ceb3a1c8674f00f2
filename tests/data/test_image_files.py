"""Image files are read as images of the kind that the model was trained on."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from side_effects import watched

from lightkit.data.image_files import find_images, read_image
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


def test_folder(tmp_path, digit):
    """A folder yields its images sorted by name, without hidden files."""
    for name in ("b.png", "a.jpg"):
        Image.fromarray(digit.numpy()).save(tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert [p.name for p in find_images(tmp_path)] == ["a.jpg", "b.png"]


def test_folder_with_a_text_file(tmp_path, digit):
    """The error names a file that is no image."""
    Image.fromarray(digit.numpy()).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"not PNG or JPEG images: notes\.txt"):
        find_images(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n" + b"\x00" * 30])
def test_not_an_image(tmp_path, content):
    """The error names a text file called .png, an empty file and a damaged one."""
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


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_nothing_there(tmp_path, make):
    """The error says that a path does not exist or that a folder is empty."""
    make(tmp_path / "in")
    with pytest.raises(DataError, match=r"does not exist|holds no images"):
        find_images(tmp_path / "in")


def test_dangling_links(tmp_path, digit):
    """One warning names the links and pipes of a folder; as the input they are an error."""
    Image.fromarray(digit.numpy()).save(tmp_path / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning, match=r"skipped, .*circle\.png, .*dangling\.png, .*pipe\.png$"):
        assert [p.name for p in find_images(tmp_path)] == ["a.png"]
    with pytest.raises(DataError, match=r"input=.*pipe\.png is a pipe, and must be a regular file"):
        find_images(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"input=.*dangling\.png does not exist"):
        find_images(tmp_path / "dangling.png")
    with pytest.raises(DataError, match=r"is a device, and must be a regular file"):
        find_images(Path("/dev/zero"))


def test_no_program_is_started_for_an_image(tmp_path):
    """Pillow would start Ghostscript for PostScript, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\nshowpage\n")
    with watched() as acts, pytest.raises(DataError, match="is not an image"):
        read_image(tmp_path / "a.png", 28)
    assert not [act for act in acts if act.startswith(("subprocess", "os.posix_spawn", "os.exec"))]


@pytest.mark.parametrize("size", [(12_000, 11_000), (1, 40_000)])
def test_images_beyond_the_limits(tmp_path, size):
    """A small file may hold any number of pixels: the header is checked before anything is unpacked."""
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    packed = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + packed)
    with pytest.raises(DataError, match=rf"has {size[0]} x {size[1]} pixels; the limits are 120,000,000 pixels"):
        read_image(tmp_path / "large.png", 28)
