"""Where compiled libraries are kept: private to the user, complete or absent, one builder at a time.

A build is a directory ``<target key>-<compiler key>`` that holds the library and ``manifest.json``. It comes
into being by one rename, and is loaded only if the library still has the size and hash that the manifest
states, so neither a killed builder nor a full disk can leave something that loads.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lightkit.paths import cache_root
from lightkit.private import find_stranger

from . import toolchain

MANIFEST = "manifest.json"


class CacheError(RuntimeError):
    """The cache directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a finished build."""

    library: str
    size: int
    sha256: str
    torch: str
    compiler: str
    flags: list[str]
    simd: str
    cuda: str
    seconds: float


def native_root() -> Path:
    """Where the builds lie."""
    try:
        return cache_root() / "native"
    except RuntimeError as error:
        raise CacheError(f"{error}; set LIGHTKIT_CACHE_DIR") from error


def check_private(directory: Path) -> None:
    """Refuses a directory that someone else could have put a library into."""
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise CacheError(f"{directory} is not a directory")
    if (reason := find_stranger(directory, follow_links=False)) is not None:
        # Who owns it alone can change it.
        advice = "" if "belongs" in reason else "chmod go-w it, or "
        raise CacheError(f"{directory} {reason}; {advice}set LIGHTKIT_CACHE_DIR{'' if advice else ' to one of yours'}")


def make_root() -> Path:
    """The directory of the builds, made if need be and checked."""
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
    """The intact library for this target, or None.

    With a compiler at hand it must be that compiler's; without one (an image that was built elsewhere), any
    compiler's will do.
    """
    directory = native_root()
    key = toolchain.compiler_key()
    pattern = f"{toolchain.target_key()}-{key or '*'}"
    try:
        if not directory.is_dir():
            return None
        check_private(directory)
        return next((library for build in sorted(directory.glob(pattern)) if (library := intact_library(build))), None)
    except OSError as error:
        raise CacheError(f"the cache cannot be read: {error}; set LIGHTKIT_CACHE_DIR") from error


def build_directory() -> Path:
    """Where the library for this target and compiler belongs."""
    return native_root() / f"{toolchain.target_key()}-{toolchain.compiler_key()}"


def read_manifest(build: Path) -> Manifest | None:
    """The manifest of a build, or None if there is none that can be read."""
    try:
        return Manifest(**json.loads((build / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def intact_library(build: Path) -> Path | None:
    """The library of a build, if it is what its manifest says and nobody else could have put it there."""
    manifest = read_manifest(build)
    if manifest is None:
        return None
    check_private(build)
    try:
        library = build / Path(manifest.library).name
        data = library.read_bytes()
    except (OSError, TypeError, ValueError):
        # The manifest is JSON of the right keys, but what it names is no file.
        return None
    if len(data) != manifest.size or hashlib.sha256(data).hexdigest() != manifest.sha256:
        return None
    return library


@contextmanager
def builder_lock(directory: Path) -> Iterator[None]:
    """Held by the one process that builds. The kernel drops it when its holder dies, however it dies."""
    with open(directory / "build.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("lightkit: waiting for another process to compile the native kernels", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def work_directory(directory: Path) -> Iterator[Path]:
    """A directory to build in. Call with the lock held: what dead builders left is swept out first."""
    for leftover in directory.glob("tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="tmp-", dir=directory))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, library: Path, manifest: dict) -> Path:
    """Makes what was built in ``work`` the build for this target, all at once; returns its library."""
    data = library.read_bytes()
    complete = Manifest(library=library.name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), **manifest)
    final = work / "publish"
    final.mkdir(mode=0o700)
    shutil.copyfile(library, final / library.name)
    (final / MANIFEST).write_text(json.dumps(asdict(complete), indent=1))
    for path in final.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    target = build_directory()
    if target.exists():
        # Damaged, or it would have been used. Another process may be reading it: away by rename, too.
        target.rename(work / f"damaged-{time.time_ns()}")
    final.rename(target)
    return target / library.name
