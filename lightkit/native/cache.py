"""The cache of compiled libraries: private to the user, each build complete or absent, one builder at a time.

A build is a directory with the library and ``manifest.json``. Its name has two keys: one of sources, flags, torch,
Python and CUDA, and one of compiler and instructions or, for a build from an archive, of the library itself. One rename
publishes a build, and it is loaded only if the library has the size and hash that the manifest states: neither a killed
builder nor a full disk leaves a build that loads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from lightkit._util.cache_dir import cache_root
from lightkit._util.ownership import find_stranger

from . import target, toolchain

MANIFEST = "manifest.json"

# The interval at which a lock that another process holds is tried, in seconds.
_RETRY_INTERVAL = 0.1


class CacheError(RuntimeError):
    """The cache directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """The facts of a finished build."""

    library: str
    size: int
    sha256: str
    base_key: str
    torch: str
    python: str
    compiler: str
    flags: list[str]
    march: str
    instructions: list[str]
    simd: str
    cuda: str
    seconds: float
    # From an archive: any machine that can run it uses it, whatever its compiler.
    is_shipped: bool = False

    def __post_init__(self) -> None:
        """Raises a TypeError for a field of another type."""
        for name in ("library", "sha256", "base_key", "torch", "python", "compiler", "march", "simd", "cuda"):
            _check_type(name, getattr(self, name), str)
        for name in ("flags", "instructions"):
            for item in _check_type(name, getattr(self, name), list):
                _check_type(name, item, str)
        _check_type("size", self.size, int)
        _check_type("seconds", self.seconds, (int, float))
        _check_type("is_shipped", self.is_shipped, bool)


def _check_type(name: str, value: Any, wanted: type | tuple[type, ...]) -> Any:
    if not isinstance(value, wanted):
        raise TypeError(f"{name} is {value!r}")
    return value


def native_root() -> Path:
    """Returns the directory of the builds; it may not exist."""
    try:
        return cache_root() / "native"
    except RuntimeError as error:
        raise CacheError(f"{error}; set LIGHTKIT_CACHE_DIR") from error


def check_private(directory: Path) -> None:
    """Raises a `CacheError` for a directory that another user could write to."""
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise CacheError(f"{directory} is not a directory")
    if (reason := find_stranger(directory, follow_links=False)) is not None:
        # Only its owner can change the mode of a directory.
        advice = "" if "belongs" in reason else "chmod go-w it, or "
        raise CacheError(f"{directory} {reason}; {advice}set LIGHTKIT_CACHE_DIR{'' if advice else ' to one of yours'}")


def make_root() -> Path:
    """Makes and checks the directory of the builds; returns it."""
    directory = native_root()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"cannot make the cache directory: {error}; set LIGHTKIT_CACHE_DIR to a place you can write"
        ) from error
    check_private(directory)
    return directory


def find() -> Path | None:
    """Returns the intact library to load here, or None.

    It is the build of this machine's compiler, else one from an archive. Without a compiler, such as in an image that
    was built elsewhere, it may be any build. Of several that the processor can run, it is the one with the most
    instructions.
    """
    directory = native_root()
    compiler = toolchain.find_compiler()
    try:
        if not directory.is_dir():
            return None
        check_private(directory)
        if compiler is not None and (library := intact_library(build_directory(compiler))) is not None:
            return library
        chosen = target.march()
        fitting = []
        for build in sorted(directory.glob(f"{target.base_key()}-*")):
            manifest = read_manifest(build)
            if (
                manifest is not None
                and (manifest.is_shipped or compiler is None)
                and chosen in ("native", manifest.march)
                and not target.missing_instructions(manifest.instructions)
            ):
                fitting.append((len(manifest.instructions), build))
        ordered = sorted(fitting, key=lambda item: -item[0])
        return next((library for _, build in ordered if (library := intact_library(build))), None)
    except OSError as error:
        raise CacheError(f"the cache cannot be read: {error}; set LIGHTKIT_CACHE_DIR") from error


def check_processor(manifest: Manifest) -> None:
    """Raises a `CacheError` for a build whose instructions this processor lacks: the first would end the process."""
    if missing := target.missing_instructions(manifest.instructions):
        raise CacheError(f"the library is for {manifest.march}, and this processor lacks {', '.join(missing)}")


def build_directory(compiler: tuple[str, ...]) -> Path:
    """Returns the directory of the build that a compiler makes."""
    root = native_root()
    built_for = target.resolve(compiler, root)
    key = target.digest(*target.compiler_identity(), built_for.march, built_for.simd, *built_for.instructions)
    return root / f"{target.base_key()}-{key}"


def read_manifest(build: Path) -> Manifest | None:
    """Returns the manifest of a build, or None if it cannot be read."""
    try:
        return Manifest(**json.loads((build / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def intact_library(build: Path) -> Path | None:
    """Returns the library of a build, or None unless it is the one of the manifest.

    Raises:
        CacheError: another user could write to the build.
    """
    manifest = read_manifest(build)
    if manifest is None:
        return None
    check_private(build)
    try:
        library = build / Path(manifest.library).name
        data = library.read_bytes()
    except (OSError, TypeError, ValueError):
        # The manifest is valid, except that its library is no file.
        return None
    if len(data) != manifest.size or hashlib.sha256(data).hexdigest() != manifest.sha256:
        return None
    return library


def sha256_of(file: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _wait_for(lock: TextIO, check: Callable[[], None]) -> None:
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check()
            time.sleep(_RETRY_INTERVAL)


@contextmanager
def builder_lock(directory: Path, check: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Holds the lock of the builder; yields its descriptor, which keeps the lock in every process that has it open.

    `check` is called repeatedly while another process holds the lock, and may raise.
    """
    with open(directory / "build.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("lightkit: waiting for another process to compile the native kernels", file=sys.stderr, flush=True)
            _wait_for(lock, check)
        try:
            yield lock.fileno()
        finally:
            # Not left to the close of the file, which a forked process has open, too.
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def work_directory(directory: Path) -> Iterator[Path]:
    """Yields a directory to build in, and removes the files of dead builders first. The caller holds the lock."""
    for leftover in directory.glob("tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="tmp-", dir=directory))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, library: Path, manifest: dict, place: Path) -> Path:
    """Publishes the files in ``work`` as the build at ``place``, atomically; returns its library."""
    complete = Manifest(library=library.name, size=library.stat().st_size, sha256=sha256_of(library), **manifest)
    final = work / "publish"
    final.mkdir(mode=0o700)
    shutil.copyfile(library, final / library.name)
    (final / MANIFEST).write_text(json.dumps(asdict(complete), indent=1))
    for path in final.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if place.exists():
        # A damaged build, else it would have been used. Another process may read it, so it is moved away by a rename.
        place.rename(work / f"damaged-{time.time_ns()}")
    final.rename(place)
    return place / library.name
