"""Archives: a build in one file, which one machine writes, and which machines without a compiler check and install.

The file has a magic line, the length of the manifest in four bytes (little-endian), the manifest in JSON, and the
library, compressed by zlib. It contains no paths: the installing machine chooses the names in its cache, and reads no
more bytes than the manifest states. The library in an archive runs code, as a wheel does.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import torch

from lightkit.errors import LightkitError

from . import cache, target, toolchain

_MAGIC = b"lightkit native library 1\n"
_LENGTH = struct.Struct("<I")
_LONGEST_MANIFEST = 1 << 16
_LARGEST_LIBRARY = 1 << 30
_CHUNK = 1 << 20


class ArchiveError(LightkitError, ValueError):
    """A file is no archive of a build, is damaged, is for another machine, or cannot be written."""


def write(library: Path, file: Path) -> None:
    """Writes a build to an archive atomically.

    Args:
        library: the library of the build in the cache, whose directory has the manifest.
        file: the path of the archive.

    Raises:
        ArchiveError: the build has no manifest, or the file cannot be written.
    """
    facts = cache.read_manifest(library.parent)
    if facts is None:
        raise ArchiveError(f"{library.parent} has no manifest")
    manifest = json.dumps(asdict(replace(facts, is_shipped=True))).encode()
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with open(descriptor, "wb") as new:
                new.write(_MAGIC + _LENGTH.pack(len(manifest)) + manifest + zlib.compress(library.read_bytes(), 9))
            os.chmod(name, 0o644)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ArchiveError(f"{file} cannot be written: {error.strerror}") from error


def install(file: Path) -> Path:
    """Checks an archive, and installs its build in the cache.

    Args:
        file: the path of the archive.

    Returns:
        The path of the installed library.

    Raises:
        ArchiveError: the file is no archive, is damaged, or is for another torch, Python, lightkit or processor.
        CacheError: the cache cannot be used.
    """
    try:
        with open(file, "rb") as archive:
            manifest = _read_manifest(archive, file)
            _check_fits(manifest, file)
            directory = cache.make_root()
            with cache.builder_lock(directory), cache.work_directory(directory) as work:
                library = work / f"{toolchain.MODULE_NAME}.so"
                _unpack(archive, library, manifest, file)
                facts = asdict(manifest)
                for name in ("library", "size", "sha256"):
                    del facts[name]
                place = directory / f"{target.base_key()}-{manifest.sha256[:16]}"
                return cache.publish(work, library, {**facts, "is_shipped": True}, place)
    except OSError as error:
        raise ArchiveError(f"{file} cannot be installed: {error.strerror}") from error


def _read_manifest(archive: BinaryIO, file: Path) -> cache.Manifest:
    if archive.read(len(_MAGIC)) != _MAGIC:
        raise ArchiveError(f"{file} is no archive of lightkit's native library")
    try:
        (length,) = _LENGTH.unpack(archive.read(_LENGTH.size))
        text = archive.read(min(length, _LONGEST_MANIFEST))
        manifest = cache.Manifest(**json.loads(text))
        if length != len(text) or not 0 < manifest.size <= _LARGEST_LIBRARY:
            raise ValueError("the lengths are wrong")
        bytes.fromhex(manifest.sha256)
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{file} is damaged: its manifest cannot be read") from error
    return manifest


def _check_fits(manifest: cache.Manifest, file: Path) -> None:
    if manifest.torch != torch.__version__:
        raise ArchiveError(f"{file} was built for torch {manifest.torch}, and this one is {torch.__version__}")
    if manifest.python != target.python_abi():
        raise ArchiveError(f"{file} was built for Python {manifest.python}, and this one is {target.python_abi()}")
    if manifest.base_key != target.base_key():
        raise ArchiveError(f"{file} was built of other sources or flags than this lightkit has, or for another CUDA")
    if missing := target.missing_instructions(manifest.instructions):
        raise ArchiveError(f"{file} is for {manifest.march}, and this processor lacks {', '.join(missing)}")


def _unpack(archive: BinaryIO, library: Path, manifest: cache.Manifest, file: Path) -> None:
    """Unpacks the library of an archive; stops at the first byte beyond the size that the manifest states.

    Args:
        archive: the archive, open after the manifest.
        library: the path to write to.
        manifest: the manifest of the archive.
        file: the path of the archive, for messages.

    Raises:
        ArchiveError: the library is damaged, or has another size or hash than the manifest states.
    """
    unpacked, left = zlib.decompressobj(), manifest.size
    try:
        with open(library, "wb") as out:
            while not unpacked.eof and (chunk := unpacked.unconsumed_tail or archive.read(_CHUNK)):
                data = unpacked.decompress(chunk, min(_CHUNK, left + 1))
                left -= len(data)
                if left < 0:
                    raise ArchiveError(f"{file} is damaged: its library is larger than it says")
                out.write(data)
    except zlib.error as error:
        raise ArchiveError(f"{file} is damaged: its library cannot be unpacked") from error
    if left or not unpacked.eof or cache.sha256_of(library) != manifest.sha256:
        raise ArchiveError(f"{file} is damaged: its library is not what it says")
