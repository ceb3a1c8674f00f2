"""Builds that are shipped: what one machine writes another installs, and nothing else than that."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lightkit import build as build_command
from lightkit.native import archive, builder, cache, target

_LENGTH = struct.Struct("<I")


@pytest.fixture
def shipped(tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of a small build, with an empty cache to install it into."""
    file = tmp_path / "lightkit.native"
    archive.write(builder.build(), file)
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "elsewhere"))
    return file


def rewritten(file: Path, library: bytes | None = None, **changes: object) -> Path:
    """The archive with another manifest, and another (compressed) library."""
    data = file.read_bytes()
    begin = len(archive._MAGIC)
    (length,) = _LENGTH.unpack(data[begin : begin + 4])
    end = begin + 4 + length
    manifest = json.dumps({**json.loads(data[begin + 4 : end]), **changes}).encode()
    library = data[end:] if library is None else library
    file.write_bytes(archive._MAGIC + _LENGTH.pack(len(manifest)) + manifest + library)
    return file


def no_builds() -> bool:
    """Whether the cache has neither a build nor what is left of one."""
    root = cache.native_root()
    return not root.exists() or not [path for path in root.iterdir() if path.is_dir()]


def test_installed_build_is_used(shipped: Path, monkeypatch: pytest.MonkeyPatch, forget_keys: Callable) -> None:
    """A machine uses what was installed, whether it has a compiler of its own or none."""
    library = archive.install(shipped)
    assert library.is_relative_to(cache.native_root())
    assert cache.find() == library
    assert builder.build() == library
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    forget_keys()
    assert cache.find() == library
    assert cache.read_manifest(library.parent).is_shipped


def test_command_writes_and_installs(
    tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--archive` and `--from` of the command do both, and say which library there is."""
    file = tmp_path / "lightkit.native"
    assert build_command.main(["--archive", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert build_command.main(["--from", str(file)]) == 0
    assert str(tmp_path / "elsewhere") in capsys.readouterr().out


def test_installing_twice_leaves_one(shipped: Path) -> None:
    """A second installation takes the place of the first."""
    assert archive.install(shipped) == archive.install(shipped)
    assert len([path for path in cache.native_root().iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0"}, "was built for torch 1.0, and this one is"),
        ({"python": "cpython-27"}, "was built for Python cpython-27, and this one is"),
        ({"base_key": "0" * 16}, "was built of other sources or flags"),
        ({"instructions": ["avx4096"], "march": "x86-64-v9"}, "for x86-64-v9, and this processor lacks avx4096"),
        ({"sha256": "0" * 64}, "its library is not what it says"),
        ({"sha256": "../../x"}, "its manifest cannot be read"),
        ({"size": 1}, "its library is larger than it says"),
        ({"size": 1 << 29}, "its library is not what it says"),
        ({"size": 1 << 40}, "its manifest cannot be read"),
        ({"size": -1}, "its manifest cannot be read"),
        ({"flags": "-O3"}, "its manifest cannot be read"),
        ({"surprise": 1}, "its manifest cannot be read"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unfit_archive_is_refused(
    shipped: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is for another machine, or lies about itself, is refused in one line, and nothing of it is kept."""
    assert build_command.main(["--from", str(rewritten(shipped, **changes))]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightkit.build: ") and message in line
    assert no_builds()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no archive"),
        (b"PK\x03\x04" + bytes(100), "is no archive"),
        (archive._MAGIC, "its manifest cannot be read"),
        (archive._MAGIC + b"\xff\xff\xff\xff{}", "its manifest cannot be read"),
        (archive._MAGIC + _LENGTH.pack(2) + b"{}", "its manifest cannot be read"),
        (archive._MAGIC + _LENGTH.pack(50_000) + b"[" * 50_000, "its manifest cannot be read"),
    ],
    ids=["empty", "zip", "cut", "endless-manifest", "no-keys", "deep"],
)
def test_other_file_is_refused(shipped: Path, content: bytes, message: str) -> None:
    """Any other file is told from an archive before much of it is read."""
    shipped.write_bytes(content)
    with pytest.raises(archive.ArchiveError, match=message):
        archive.install(shipped)
    assert no_builds()


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_cut_archive_is_refused(shipped: Path, kept: float) -> None:
    """A transfer that broke off does not install half a library."""
    data = shipped.read_bytes()
    shipped.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(archive.ArchiveError, match="is damaged"):
        archive.install(shipped)
    assert no_builds()


def test_bomb_is_stopped_at_its_stated_size(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that unpacks to far more than the manifest states fills neither the memory nor the disk."""
    rewritten(shipped, library=zlib.compress(bytes(1 << 28), 9), size=1000)
    monkeypatch.setattr(archive, "_CHUNK", 1 << 16)
    with pytest.raises(archive.ArchiveError, match="larger than it says"):
        archive.install(shipped)
    assert no_builds()


def test_missing_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    """A wrong path is no traceback."""
    with pytest.raises(archive.ArchiveError, match="cannot be installed: No such file"):
        archive.install(tmp_path / "absent")
    with pytest.raises(archive.ArchiveError, match="cannot be written: No such file"):
        archive.write(builder.build(), tmp_path / "absent" / "file")


def test_name_in_the_manifest_is_not_used(shipped: Path, tmp_path: Path) -> None:
    """The library goes where this machine puts it, whatever path an archive names."""
    library = archive.install(rewritten(shipped, library=None, **{"cuda": "../../evil"}))
    manifest = cache.read_manifest(library.parent)
    data = json.dumps(asdict(replace(manifest, library="../../evil.so"))).encode()
    rest = zlib.compress(library.read_bytes())
    shipped.write_bytes(archive._MAGIC + _LENGTH.pack(len(data)) + data + rest)
    assert archive.install(shipped) == library
    assert not list(tmp_path.rglob("evil*"))


def test_widest_that_the_processor_runs_is_chosen(shipped: Path, tmp_path: Path) -> None:
    """Of several installed builds the one with the most instructions of this processor is loaded."""
    few = archive.install(rewritten(shipped, instructions=[]))
    some = sorted(target.processor())[:3]
    # Another library, so that it is another build.
    other = few.read_bytes() + b"\0"
    archive.write(few, shipped)

    facts = {"instructions": some, "size": len(other), "sha256": hashlib.sha256(other).hexdigest()}
    many = archive.install(rewritten(shipped, library=zlib.compress(other), **facts))
    assert cache.find() == many != few
