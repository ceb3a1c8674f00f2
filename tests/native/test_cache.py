"""The cache of compiled libraries: nothing damaged and nothing foreign is ever loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lightkit.native import builder, cache, toolchain

_CONTENT = bytes(range(256)) * 16
_SOMEBODY_ELSE = 12345


def _answers() -> set[str]:
    """The files that keep what compilers said of the processor."""
    return {path.name for path in cache.native_root().glob("target-*.json")}


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A finished build as `cache.publish` leaves it, with a library of 4 KiB that nobody could load."""
    directory = tmp_path / "native" / "target-compiler"
    directory.mkdir(mode=0o700, parents=True)
    (directory / "library.so").write_bytes(_CONTENT)
    write_manifest(directory, good_manifest())
    return directory


def good_manifest() -> cache.Manifest:
    return cache.Manifest(
        library="library.so",
        size=len(_CONTENT),
        sha256=hashlib.sha256(_CONTENT).hexdigest(),
        base_key="key",
        torch="2.10",
        python="cpython-311",
        compiler="g++ 12",
        flags=["-O3"],
        march="native",
        instructions=["avx2"],
        simd="AVX2",
        cuda="none: the installed torch is a CPU build",
        seconds=1.0,
    )


def write_manifest(build: Path, manifest: cache.Manifest) -> None:
    (build / cache.MANIFEST).write_text(json.dumps(asdict(manifest)))


def test_intact_library_is_found(build: Path) -> None:
    """The other tests here refuse a build for its damage, not for how it was set up."""
    assert cache.intact_library(build) == build / "library.so"


@pytest.mark.parametrize("length", [0, 1, len(_CONTENT) - 1])
def test_truncated_library_is_not_loaded(build: Path, length: int) -> None:
    """A library that a full disk or a broken copy cut short."""
    os.truncate(build / "library.so", length)
    assert cache.intact_library(build) is None


@pytest.mark.parametrize("position", [0, len(_CONTENT) // 2, len(_CONTENT) - 1])
def test_library_with_a_changed_byte_is_not_loaded(build: Path, position: int) -> None:
    """One byte that differs, at the same size."""
    content = bytearray(_CONTENT)
    content[position] ^= 1
    (build / "library.so").write_bytes(content)
    assert cache.intact_library(build) is None


def test_longer_library_is_not_loaded(build: Path) -> None:
    """Bytes appended to a good library."""
    (build / "library.so").write_bytes(_CONTENT + b"\0")
    assert cache.intact_library(build) is None


@pytest.mark.parametrize("name", ["library.so", cache.MANIFEST])
def test_build_with_a_missing_file_is_not_loaded(build: Path, name: str) -> None:
    """A build directory that lost its library or its manifest."""
    (build / name).unlink()
    assert cache.intact_library(build) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        json.dumps({"library": "library.so"}).encode(),
        json.dumps({**asdict(good_manifest()), "surprise": 1}).encode(),
        json.dumps({**asdict(good_manifest()), "library": 5}).encode(),
        json.dumps({**asdict(good_manifest()), "library": None}).encode(),
        json.dumps({**asdict(good_manifest()), "library": "library.so\0"}).encode(),
        json.dumps({**asdict(good_manifest()), "library": ""}).encode(),
        json.dumps({**asdict(good_manifest()), "size": str(len(_CONTENT))}).encode(),
        json.dumps({**asdict(good_manifest()), "sha256": None}).encode(),
    ],
    ids=[
        *("empty", "cut", "null", "list", "no-keys", "not-text", "keys-missing", "key-unknown"),
        *("library-number", "library-null", "library-nul-byte", "library-empty", "size-text", "hash-null"),
    ],
)
def test_garbled_manifest_is_not_believed(build: Path, content: bytes) -> None:
    """Whatever a manifest has turned into, it counts as none and raises nothing."""
    (build / cache.MANIFEST).write_bytes(content)
    assert cache.intact_library(build) is None


def test_manifest_cannot_point_outside_its_build(build: Path) -> None:
    """A library elsewhere is not loaded, even with the size and hash that the manifest states."""
    (build / "library.so").rename(build.parent / "library.so")
    write_manifest(build, replace(good_manifest(), library="../library.so"))
    assert cache.intact_library(build) is None


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Nobody else can slip a library in; the message says what to change."""
    tmp_path.chmod(mode)
    with pytest.raises(cache.CacheError, match=r"can be written by other users; chmod go-w it, or set LIGHTKIT_CACHE"):
        cache.check_private(tmp_path)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_directory_that_others_can_only_read_is_accepted(tmp_path: Path, mode: int) -> None:
    """A usual umask is no reason to refuse a cache."""
    tmp_path.chmod(mode)
    cache.check_private(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """A library that another user could have put there is not trusted; the message says what to set."""
    os.chown(tmp_path, _SOMEBODY_ELSE, -1)
    with pytest.raises(cache.CacheError, match=rf"another user \(uid {_SOMEBODY_ELSE}\); set LIGHTKIT_CACHE_DIR"):
        cache.check_private(tmp_path)


def test_link_in_place_of_a_build_is_refused(build: Path) -> None:
    """A link to a directory that somebody else controls is not followed."""
    target = build.rename(build.parent / "elsewhere")
    build.symlink_to(target)
    with pytest.raises(cache.CacheError, match="is not a directory"):
        cache.intact_library(build)


def test_build_that_others_can_write_is_refused(build: Path) -> None:
    """The check covers the directory of each build, not only the one of all builds."""
    build.chmod(0o770)
    with pytest.raises(cache.CacheError, match="chmod go-w"):
        cache.intact_library(build)


@pytest.mark.parametrize("step", [cache.find, cache.make_root], ids=["find", "make_root"])
def test_shared_cache_is_refused_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Callable[[], object]
) -> None:
    """Neither looking for a library nor building one goes on in a directory that others can write."""
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path))
    cache.native_root().mkdir()
    cache.native_root().chmod(0o777)
    with pytest.raises(cache.CacheError, match="chmod go-w"):
        step()


def test_cache_that_cannot_be_made_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory below a regular file is an error of the cache, not a traceback of the system's."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "file"))
    assert cache.find() is None
    with pytest.raises(cache.CacheError, match="set LIGHTKIT_CACHE_DIR to a place you can write"):
        cache.make_root()


def test_new_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory that lightkit makes is closed to others, parents included in what is made."""
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert cache.make_root().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["truncated", "changed", "no-manifest"])
def test_damaged_build_is_built_again(tiny_sources: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Damage in the cache costs one more build, after which the library is whole and the debris gone."""
    library = builder.build()
    whole = library.read_bytes()
    if damage == "truncated":
        os.truncate(library, len(whole) // 2)
    elif damage == "changed":
        library.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        (library.parent / cache.MANIFEST).unlink()
    assert cache.find() is None
    capfd.readouterr()
    assert builder.build() == library
    assert capfd.readouterr().err.count("lightkit: compiling") == 1
    assert cache.find() == library
    assert {path.name for path in cache.native_root().iterdir()} == {library.parent.name, "build.lock", *_answers()}


def test_intact_build_is_not_built_again(tiny_sources: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second request is answered from the cache."""
    library = builder.build()
    capfd.readouterr()
    assert builder.build() == library
    assert "compiling" not in capfd.readouterr().err


def test_changed_source_is_another_build(tiny_sources: Path, forget_keys: Callable[[], None]) -> None:
    """A library is never used for sources that it was not made of, headers included."""
    library = builder.build()
    (tiny_sources / "new.h").write_text("// new\n")
    forget_keys()
    assert cache.find() is None
    (tiny_sources / "new.h").unlink()
    forget_keys()
    assert cache.find() == library


def test_another_compiler_is_another_build(
    tiny_sources: Path, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_keys: Callable[[], None]
) -> None:
    """The library of one compiler does not answer for another."""
    builder.build()
    other = tmp_path / "other-compiler"
    other.write_text(f'#!/bin/sh\nexec "{compiler}" "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    forget_keys()
    assert cache.find() is None


@pytest.fixture
def awkward_directory(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "it's 100% $HOME: a (real) directory"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def test_awkward_paths_build(
    tiny_sources: Path, awkward_directory: Path, monkeypatch: pytest.MonkeyPatch, forget_keys: Callable[[], None]
) -> None:
    """Spaces, quotes and what ninja and the shell find special, in the paths of the sources and of the cache."""
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(awkward_directory / "cache"))
    monkeypatch.setattr(toolchain, "SOURCE_DIR", Path(shutil.copytree(tiny_sources, awkward_directory / "csrc")))
    forget_keys()
    assert builder.build().is_relative_to(awkward_directory)
