"""What a server needs to come back: a snapshot now and then, and a log of every update since."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightkit.errors import CheckpointError, ConfigError
from lightkit.files import write_atomically

# A log that is so many times as long as a snapshot is followed by one, whatever the number of its updates; not one that
# is shorter than so many bytes.
_LOG_TO_SNAPSHOT = 8
_LOG_LEAST = 1 << 28

# Of a record: bytes of its text, bytes of its tensors, checksum of both.
_HEAD = struct.Struct("<QQI")


class Journal:
    """A directory with the newest snapshot, and the log that goes on from it.

    An update is in the log before the worker that pushed it hears of it. It survives the end of the process, however
    that comes; what a machine that loses power had not written to the disk yet is lost.

    Args:
        directory: of this server alone; made, for this user alone, if it is not there.

    Raises:
        ConfigError: another server has it.
        OSError: it cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (self._directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"another parameter server has the directory {self._directory}") from None
        self._log: BinaryIO | None = None
        self._snapshot_bytes = 0
        found = [int(path.stem.partition("-")[2]) for path in self._directory.glob("snapshot-*.pt")]
        self._number = max(found, default=-1)
        # What a server left that ended in the middle of a snapshot.
        self._remove_all_but(self._number)

    def __str__(self) -> str:
        return str(self._directory)

    @property
    def is_long(self) -> bool:
        """Whether the log has become so long that a snapshot takes less of the disk."""
        return self._log is not None and self._log.tell() > max(_LOG_TO_SNAPSHOT * self._snapshot_bytes, _LOG_LEAST)

    def load(self) -> dict[str, Any] | None:
        """The newest snapshot, or None.

        Raises:
            CheckpointError: it is damaged.
        """
        if self._number < 0:
            return None
        path = self._path("snapshot", "pt")
        self._snapshot_bytes = path.stat().st_size
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            # torch raises half a dozen types here.
            raise CheckpointError(f"the snapshot {path} is damaged: {str(error).partition(chr(10))[0]}") from error

    def replay(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The updates since, each with its tensors' bytes. What the end of the server cut short is left out."""
        path = self._path("log", "bin")
        whole = 0
        if path.exists():
            with path.open("rb") as log:
                while (record := _read(log)) is not None:
                    whole = log.tell()
                    yield record
        self._log = path.open("ab")
        self._log.truncate(whole)

    def snapshot(self, state: dict[str, Any]) -> None:
        """Writes a snapshot, from which on a new log counts."""
        path = self._directory / f"snapshot-{self._number + 1}.pt"
        write_atomically(path, lambda stream: torch.save(state, stream))
        self._number += 1
        self._snapshot_bytes = path.stat().st_size
        if self._log is not None:
            self._log.close()
        self._log = self._path("log", "bin").open("wb")
        self._remove_all_but(self._number)

    def append(self, update: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Adds an update to the log.

        Raises:
            OSError: the disk is full, or gone; the log is as it was.
        """
        text = json.dumps(update).encode()
        parts = [memoryview(tensor.view(torch.uint8).numpy()) for tensor in tensors if tensor.numel()]
        checksum = zlib.crc32(text)
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        start = self._log.tell()
        try:
            self._log.write(_HEAD.pack(len(text), sum(map(len, parts)), checksum))
            for part in (text, *parts):
                self._log.write(part)
            # To the system, which keeps it when this process ends.
            self._log.flush()
        except OSError:
            # What follows a torn record would not be found.
            self._log = _reopen(self._log, start)
            raise

    def clear(self) -> None:
        """Removes what is there: the job has come to its end."""
        if self._log is not None:
            self._log.close()
        self._remove_all_but(None)
        (self._directory / "lock").unlink(missing_ok=True)
        # Unless somebody else keeps something there.
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _remove_all_but(self, number: int | None) -> None:
        kept = {f"snapshot-{number}.pt", f"log-{number}.bin"}
        for pattern in ("snapshot-*.pt", "log-*.bin", ".snapshot-*.pt.*"):
            for path in self._directory.glob(pattern):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def _path(self, name: str, suffix: str) -> Path:
        return self._directory / f"{name}-{self._number}.{suffix}"


def _reopen(log: BinaryIO, length: int) -> BinaryIO:
    """The log of that length: its own buffer may still hold what could not be written."""
    path = log.name
    with contextlib.suppress(OSError):
        log.close()
    os.truncate(path, length)
    return open(path, "ab")


def _read(log: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    head = log.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    text_length, length, checksum = _HEAD.unpack(head)
    if text_length + length > os.fstat(log.fileno()).st_size - log.tell():
        return None
    text, body = log.read(text_length), log.read(length)
    if zlib.crc32(body, zlib.crc32(text)) != checksum:
        return None
    return json.loads(text), body


def fill(tensors: Sequence[Tensor], body: bytes) -> None:
    """Puts the bytes of an update into tensors like those that were given to `Journal.append`."""
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        tensor.view(torch.uint8).numpy()[:] = np.frombuffer(body[start:end], dtype=np.uint8)
        start = end
