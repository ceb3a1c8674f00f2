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

# The interval in seconds between two attempts to take a lock that another process holds.
_RETRY_INTERVAL = 0.1


class CacheError(RuntimeError):
    """The cache directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """The facts of a finished build, as ``manifest.json`` has them.

    Args:
        library: the file name of the library.
        size: the size of the library in bytes.
        sha256: the SHA-256 of the library in hexadecimal digits.
        base_key: the digest of `lightkit.native.target.base_key`.
        torch: the version of torch.
        python: the ABI tag of Python's extensions.
        compiler: the first line of the compiler's ``--version``.
        flags: the flags of every C++ file.
        march: the value of ``LIGHTKIT_MARCH``.
        instructions: the instructions that the library may use, as /proc/cpuinfo names them.
        simd: the level of at::vec: ``AVX512``, ``AVX2`` or ``DEFAULT``.
        cuda: nvcc's version and architectures, or ``none:`` and the reason.
        seconds: the duration of the build in seconds.
        is_shipped: True for a build from an archive.
    """

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
    # A machine uses a shipped build if its processor can run the library, whatever its compiler is.
    is_shipped: bool = False

    def __post_init__(self) -> None:
        """Checks the types of the fields, which come from a file.

        Raises:
            TypeError: a field has another type.
        """
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
    """Returns the path of the directory of the builds, which may not exist.

    Raises:
        CacheError: the home directory cannot be determined.
    """
    try:
        return cache_root() / "native"
    except RuntimeError as error:
        raise CacheError(f"{error}; set LIGHTKIT_CACHE_DIR") from error


def check_private(directory: Path) -> None:
    """Rejects a directory that another user could write to.

    Raises:
        CacheError: ``directory`` is not a directory, or another user could write to it.
        OSError: ``directory`` does not exist.
    """
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise CacheError(f"{directory} is not a directory")
    if (reason := find_stranger(directory, follow_links=False)) is not None:
        # Only its owner can change the mode of a directory.
        advice = "" if "belongs" in reason else "chmod go-w it, or "
        raise CacheError(f"{directory} {reason}; {advice}set LIGHTKIT_CACHE_DIR{'' if advice else ' to one of yours'}")


def make_root() -> Path:
    """Makes the directory of the builds, checks it with `check_private` and returns its path.

    Raises:
        CacheError: the directory cannot be made, or another user could write to it.
    """
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
    """Returns the path of the intact library in the cache that this process should load.

    The build that this machine's compiler would make comes first, then builds from an archive. Without a compiler, such
    as in an image that was built elsewhere, any build of the same `base_key` will do. Of several builds that the
    processor can run, the function takes the one with the most instructions.

    Returns:
        The path; None if the cache has no such library.

    Raises:
        CacheError: the cache cannot be used.
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
    """Rejects a build whose instructions this processor lacks, since such an instruction ends the process.

    Raises:
        CacheError: the processor lacks instructions in ``manifest``; the message names them.
    """
    if missing := target.missing_instructions(manifest.instructions):
        raise CacheError(f"the library is for {manifest.march}, and this processor lacks {', '.join(missing)}")


def build_directory(compiler: tuple[str, ...]) -> Path:
    """Returns the path of the directory for the build that ``compiler`` would make; it may not exist."""
    root = native_root()
    built_for = target.resolve(compiler, root)
    key = target.digest(*target.compiler_identity(), built_for.march, built_for.simd, *built_for.instructions)
    return root / f"{target.base_key()}-{key}"


def read_manifest(build: Path) -> Manifest | None:
    """Returns the manifest in the directory ``build``; None if it is missing or invalid."""
    try:
        return Manifest(**json.loads((build / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def intact_library(build: Path) -> Path | None:
    """Returns the path of the library of a build after a check of its size and hash.

    Args:
        build: the directory of the build.

    Returns:
        The path; None if the manifest or the library is missing, or the library is not the one of the manifest.

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
    """Returns the SHA-256 of the content of ``file`` in hexadecimal digits."""
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
    """Holds the lock of the builder within the context, so that one process at a time builds.

    Args:
        directory: the directory of the builds.
        check: a function that is called repeatedly while another process holds the lock; it may raise an exception.

    Yields:
        The descriptor of the lock file. A process that inherits the descriptor keeps the lock until the process ends.
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
            # The close of the file does not release the lock while a forked process has the file open, too.
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def work_directory(directory: Path) -> Iterator[Path]:
    """Yields a new directory to build in, and removes it afterwards; first removes those that killed builders left.

    Args:
        directory: the directory of the builds, whose lock the caller holds.
    """
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
    """Publishes a library as a build in the cache, atomically, and returns the path of the published library.

    Args:
        work: the working directory of the build, on the file system of the cache.
        library: the compiled library.
        manifest: the fields of the `Manifest` except ``library``, ``size`` and ``sha256``.
        place: the directory of the build. The function replaces a build there without a check: the caller has found
            it damaged.
    """
    complete = Manifest(library=library.name, size=library.stat().st_size, sha256=sha256_of(library), **manifest)
    final = work / "publish"
    final.mkdir(mode=0o700)
    shutil.copyfile(library, final / library.name)
    (final / MANIFEST).write_text(json.dumps(asdict(complete), indent=1))
    for path in final.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if place.exists():
        # An existing build is damaged, else `find` had returned it. Another process may read it, so a rename moves it.
        place.rename(work / f"damaged-{time.time_ns()}")
    final.rename(place)
    return place / library.name
