"""Where compiled libraries are kept: private to the user, complete or absent, one builder at a time.

A build is a directory that holds the library and ``manifest.json``. Its name begins with the key of what it was made
of and for, apart from the processor; then follows a key of compiler and instructions or, of one that came out of an
archive, of the library itself. It comes into being by one rename, and is loaded only if the library still has the size
and hash that the manifest states, so neither a killed builder nor a full disk can leave something that loads.
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

# How often a lock that another process holds is looked at again, in seconds.
_LOOKED_AGAIN = 0.1


class CacheError(RuntimeError):
    """The cache directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a finished build."""

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
    # Whether it came out of an archive, so that it is used whatever compiler is here.
    is_shipped: bool = False

    def __post_init__(self) -> None:
        """Raises a TypeError for what is of another type than it is here."""
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
    """Returns the intact library to load here, or None.

    It is the one that the compiler here would make, else one that came out of an archive; without a compiler (an image
    that was built elsewhere) anyone's will do. Of several that the processor can run, that with the most instructions
    is chosen.
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
    """Raises a `CacheError` for instructions that this processor lacks: the first would end the process."""
    if missing := target.missing_instructions(manifest.instructions):
        raise CacheError(f"the library is for {manifest.march}, and this processor lacks {', '.join(missing)}")


def build_directory(compiler: tuple[str, ...]) -> Path:
    """Where the library that this compiler makes belongs."""
    root = native_root()
    made = target.resolve(compiler, root)
    key = target.digest(*target.compiler_identity(), made.march, made.simd, *made.instructions)
    return root / f"{target.base_key()}-{key}"


def read_manifest(build: Path) -> Manifest | None:
    """The manifest of a build, or None if there is none that can be read."""
    try:
        return Manifest(**json.loads((build / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
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


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _wait_for(lock: TextIO, check: Callable[[], None]) -> None:
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check()
            time.sleep(_LOOKED_AGAIN)


@contextmanager
def builder_lock(directory: Path, check: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Held by the one process that builds; gives its descriptor. It goes with the last process that has that open.

    `check` is called again and again while another process holds it, and may raise.
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
            # Not left to the closing of the file, which a process forked meanwhile has, too.
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def work_directory(directory: Path) -> Iterator[Path]:
    """A directory to build in. Call with the lock held: what dead builders left is swept out first."""
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
    """Makes what was built in ``work`` the build at ``place``, all at once; returns its library."""
    complete = Manifest(library=library.name, size=library.stat().st_size, sha256=sha256_of(library), **manifest)
    final = work / "publish"
    final.mkdir(mode=0o700)
    shutil.copyfile(library, final / library.name)
    (final / MANIFEST).write_text(json.dumps(asdict(complete), indent=1))
    for path in final.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if place.exists():
        # Damaged, or it would have been used. Another process may be reading it: away by rename, too.
        place.rename(work / f"damaged-{time.time_ns()}")
    final.rename(place)
    return place / library.name
