"""A write-ahead log: snapshots of a server's state, and a log of the updates since the latest snapshot."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightkit._util.atomic_write import write_atomically
from lightkit.errors import CheckpointError, ConfigError
from lightkit.parameter_server.encoding import bytes_of, decode, encode
from lightkit.parameter_server.records import (
    MAGIC_BYTES,
    ends_in_trailer,
    find_record,
    find_record_after,
    write_record,
)

_log = logging.getLogger(__name__)

# The log asks for a new snapshot when it exceeds both limits: this multiple of the snapshot's bytes, and these bytes.
_LOG_TO_SNAPSHOT = 8
_MIN_LOG_BYTES = 1 << 28

_SNAPSHOT_MAGIC = b"lksnap02"


class WriteAheadLog:
    """A directory with the latest snapshot and the log of the updates after it.

    The server writes an update to the log before it replies to the worker that pushed the gradient. The update survives
    the end of the process in any way; it is lost if the machine loses power before the system has written the log to
    the disk.

    Snapshots and updates have checksums, which are checked before use. If the log ends in an incomplete record or in
    zeros, the server ended while it wrote that record, and the record is left out. Other damage is an error that
    changes nothing, unless ``recover_until_damage`` is set.

    Args:
        directory: a directory for this server alone, which is created with access for this user alone.
        recover_until_damage: move the rest of a damaged log to ``damaged-log-N-from-byte-M.bin`` in the directory, and
            continue from the last update before the damage. The server never removes that file.

    Raises:
        ConfigError: another server uses the directory.
        CheckpointError: an earlier release wrote the files in the directory, which have no checksums.
        OSError: the directory is not writable.
    """

    def __init__(self, directory: str | Path, recover_until_damage: bool = False) -> None:
        self._directory = Path(directory)
        self._recover_until_damage = recover_until_damage
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (self._directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"another parameter server has the directory {self._directory}") from None
        if old := sorted(self._directory.glob("snapshot-*.pt")):
            self._lock.close()
            raise CheckpointError(
                f"{old[-1]} is of an earlier release of lightkit, which writes no checksums: end that training with "
                "the release that began it, or choose another directory"
            )
        self._log: BinaryIO | None = None
        self._log_magic = b""
        self._next_sequence = 0
        self._snapshot_bytes = 0
        # Snapshot and log with the same generation belong together.
        self._generation = max((_generation_of(path) for path in self._directory.glob("snapshot-*.bin")), default=-1)

    def __str__(self) -> str:
        return str(self._directory)

    @property
    def is_long(self) -> bool:
        """True if the log is so long that the server should write a new snapshot, which needs much less space."""
        limit = max(_LOG_TO_SNAPSHOT * self._snapshot_bytes, _MIN_LOG_BYTES)
        return self._log is not None and self._log.tell() > limit

    def load(self) -> Any:
        """Returns the latest snapshot, and removes the files of an interrupted snapshot.

        Returns:
            The state that `snapshot` received; None if the directory has no snapshot.

        Raises:
            CheckpointError: the snapshot is damaged; the method has removed nothing.
        """
        state = None if self._generation < 0 else self._load(self._path("snapshot"))
        self._remove_all_except(self._generation)
        return state

    def _load(self, path: Path) -> Any:
        try:
            with path.open("rb") as stream:
                self._snapshot_bytes = os.fstat(stream.fileno()).st_size
                record = find_record(stream, 0, _SNAPSHOT_MAGIC)
                if record is None or record.end != self._snapshot_bytes or record.sequence != self._generation:
                    raise ValueError("its checksum is wrong")
                stream.seek(record.text)
                text = stream.read(record.body - record.text)
                saved = decode(text, record.trailer - record.body, lambda tensors: _read_into(stream, tensors))
                self._log_magic = bytes.fromhex(saved["mark"])
                return saved["state"]
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the snapshot {path} is damaged: {error}; the server cannot recover from it: begin anew in another "
                "directory, from a checkpoint of the training"
            ) from None

    def replay(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the updates since the snapshot, and then opens the log to append to it.

        Yields:
            The JSON values and the bytes of the tensors that `append` received for an update.

        Raises:
            CheckpointError: the log is damaged or missing.
        """
        path = self._path("log")
        if not path.exists():
            if not self._recover_until_damage:
                raise CheckpointError(f"the log {path} is missing, with the updates after the snapshot{_advice()}")
            path.touch()
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            end = 0
            while True:
                record = find_record(stream, end, self._log_magic)
                if record is None or record.sequence != self._next_sequence:
                    break
                stream.seek(record.text)
                text, body = stream.read(record.body - record.text), stream.read(record.trailer - record.body)
                yield json.loads(text), body
                end = record.end
                self._next_sequence += 1
            if end < size:
                self._check_rest(stream, end, size)
        os.truncate(path, end)
        self._log = path.open("ab")

    def _check_rest(self, stream: BinaryIO, end: int, size: int) -> None:
        """Checks whether the bytes after the last complete record are an incomplete record or damage.

        An incomplete record gives a warning. With ``recover_until_damage`` the method copies damage to another file.

        Args:
            stream: the log.
            end: the offset after the last complete record.
            size: the size of the log in bytes.

        Raises:
            CheckpointError: the bytes are damage, and ``recover_until_damage`` is False.
        """
        # A complete record with the next sequence number at a later place, or a repeated one, is damage too.
        following, place = 0, end
        while (record := find_record_after(stream, place, self._log_magic, self._next_sequence - 1)) is not None:
            following, place = following + 1, record.end
        if not following and not ends_in_trailer(stream, self._log_magic):
            _log.warning("the log in %s ends in %d bytes of an incomplete update: left out", self, size - end)
            return
        damage = f"the log {self._path('log')} is damaged at byte {end} of {size}; {following} whole updates follow"
        if not self._recover_until_damage:
            raise CheckpointError(f"{damage}, which workers have a reply for. Nothing was removed{_advice()}")
        aside = self._directory / f"damaged-log-{self._generation}-from-byte-{end}.bin"

        def copy(target: BinaryIO) -> None:
            stream.seek(end)
            while part := stream.read(1 << 20):
                target.write(part)

        write_atomically(aside, copy)
        _log.warning("%s: they are left out, and kept in %s", damage, aside)

    def snapshot(self, state: dict[str, Any]) -> None:
        """Writes a snapshot, and begins a new, empty log after it.

        Args:
            state: the state as JSON values and tensors.

        Raises:
            OSError: the disk is full or gone; the earlier snapshot and its log are as they were.
        """
        generation, magic = self._generation + 1, secrets.token_bytes(MAGIC_BYTES)
        text, tensors = encode({"mark": magic.hex(), "state": state})
        parts = [bytes_of(tensor) for tensor in tensors if tensor.numel()]
        # The log comes first: a snapshot without a log would look like one whose updates are lost.
        log = (self._directory / f"log-{generation}.bin").open("wb")
        path = self._directory / f"snapshot-{generation}.bin"
        try:
            write_atomically(path, lambda stream: write_record(stream, _SNAPSHOT_MAGIC, generation, text, parts))
        except BaseException:
            log.close()
            os.unlink(log.name)
            raise
        self._generation, self._log_magic, self._next_sequence = generation, magic, 0
        self._snapshot_bytes = path.stat().st_size
        if self._log is not None:
            self._log.close()
        self._log = log
        self._remove_all_except(generation)

    def append(self, update: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Appends an update to the log; a `snapshot` or a `replay` must have opened the log.

        Args:
            update: the update as JSON values.
            tensors: the gradient of the update, contiguous CPU tensors.

        Raises:
            OSError: the disk is full or gone; the log is as it was.
        """
        assert self._log is not None
        start = self._log.tell()
        parts = [bytes_of(tensor) for tensor in tensors if tensor.numel()]
        try:
            write_record(self._log, self._log_magic, self._next_sequence, json.dumps(update).encode(), parts)
            # To the system, which keeps it after the end of this process.
            self._log.flush()
        except OSError:
            # A record after an incomplete one would count as damage.
            self._log = _reopen(self._log, start)
            raise
        self._next_sequence += 1

    def close(self) -> None:
        """Closes the files and releases the lock of the directory."""
        if self._log is not None:
            self._log.close()
        self._lock.close()

    def clear(self) -> None:
        """Removes all files of the log after the end of the training, and the directory if it is empty then."""
        if self._log is not None:
            self._log.close()
        self._remove_all_except(None)
        (self._directory / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _remove_all_except(self, generation: int | None) -> None:
        kept = {f"snapshot-{generation}.bin", f"log-{generation}.bin"}
        for pattern in ("snapshot-*.bin", "log-*.bin", ".snapshot-*.bin.*"):
            for path in self._directory.glob(pattern):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}-{self._generation}.bin"


def fill(tensors: Sequence[Tensor], body: bytes) -> None:
    """Copies the bytes of an update to tensors.

    Args:
        tensors: contiguous CPU tensors with the shapes and dtypes of those that `WriteAheadLog.append` received.
        body: the bytes that `WriteAheadLog.replay` yields.

    Raises:
        ValueError: the tensors have another number of bytes than ``body``.
    """
    expected = sum(tensor.nbytes for tensor in tensors)
    if len(body) != expected:
        raise ValueError(f"an update has {len(body)} bytes, and its parameters have {expected}")
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        tensor.view(torch.uint8).numpy()[:] = np.frombuffer(body[start:end], dtype=np.uint8)
        start = end


def _advice() -> str:
    return (
        ". To continue from the last update before the damage, start the server with --recover-until-damage "
        "(Server(recover_until_damage=True)), which keeps the rest in another file"
    )


def _generation_of(path: Path) -> int:
    generation = path.stem.partition("-")[2]
    return int(generation) if generation.isdecimal() else -1


def _read_into(stream: BufferedReader, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.numel() and stream.readinto(bytes_of(tensor)) != tensor.nbytes:
            raise ValueError("it ends too early")


def _reopen(log: BinaryIO, length: int) -> BinaryIO:
    """Cuts a log to ``length`` bytes, and returns a new stream at its end.

    The buffer of the old stream may hold bytes that did not fit on the disk.
    """
    path = log.name
    with contextlib.suppress(OSError):
        log.close()
    os.truncate(path, length)
    return open(path, "ab")
