"""What a server needs to come back: a snapshot now and then, and a log of every update since."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightkit._util.atomic_write import write_atomically
from lightkit.errors import CheckpointError, ConfigError
from lightkit.parameter_server.encoding import bytes_of, decode, encode
from lightkit.parameter_server.records import (
    MARK_BYTES,
    ends_in_a_tail,
    find_record,
    find_record_after,
    write_record,
)

_log = logging.getLogger(__name__)

# A log that is so many times as long as a snapshot is followed by one, whatever the number of its updates; not one that
# is shorter than so many bytes.
_LOG_TO_SNAPSHOT = 8
_LOG_LEAST = 1 << 28

_SNAPSHOT_MARK = b"lksnap02"


class WriteAheadLog:
    """A directory with the newest snapshot, and the log that goes on from it.

    An update is in the log before the worker that pushed it hears of it. It survives the end of the process, however
    that comes; what a machine that loses power had not written to the disk yet is lost.

    Everything has a checksum, which is looked at before anything is used. A log that ends within a record, or in zeros,
    is one whose end was not written: that record is left out. One that is damaged otherwise is an error, and stays as
    it is, unless the caller wants to go on without what follows the damage.

    Args:
        directory: of this server alone; made, for this user alone, if it is not there.
        recover_until_damage: moves what follows damage of the log to ``damaged-log-N-from-byte-M.bin`` in the
            directory, and goes on from the last update before it. The server never removes that file.

    Raises:
        ConfigError: another server has it.
        CheckpointError: it is of an earlier release, whose files have no checksums.
        OSError: it cannot be written.
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
        self._mark = b""
        self._next = 0
        self._snapshot_bytes = 0
        found = [_number_of(path) for path in self._directory.glob("snapshot-*.bin")]
        self._number = max(found, default=-1)

    def __str__(self) -> str:
        return str(self._directory)

    @property
    def is_long(self) -> bool:
        """Whether the log has become so long that a snapshot takes less of the disk."""
        return self._log is not None and self._log.tell() > max(_LOG_TO_SNAPSHOT * self._snapshot_bytes, _LOG_LEAST)

    def load(self) -> Any:
        """Returns the newest snapshot, or None, and removes what a server left that ended in the middle of one.

        Raises:
            CheckpointError: it is damaged; nothing has been removed.
        """
        state = None if self._number < 0 else self._load(self._path("snapshot"))
        self._remove_all_but(self._number)
        return state

    def _load(self, path: Path) -> Any:
        try:
            with path.open("rb") as stream:
                self._snapshot_bytes = os.fstat(stream.fileno()).st_size
                record = find_record(stream, 0, _SNAPSHOT_MARK)
                if record is None or record.end != self._snapshot_bytes or record.number != self._number:
                    raise ValueError("its checksum is not that of what it holds")
                stream.seek(record.text)
                text = stream.read(record.body - record.text)
                saved = decode(text, record.tail - record.body, lambda tensors: _read_into(stream, tensors))
                self._mark = bytes.fromhex(saved["mark"])
                return saved["state"]
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the snapshot {path} is damaged: {error}; the server cannot come back from it: begin anew in another "
                "directory, from a checkpoint of the training"
            ) from None

    def replay(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the updates since the snapshot, each with its tensors' bytes; then the log goes on from there.

        Raises:
            CheckpointError: the log is damaged, or not there.
        """
        path = self._path("log")
        if not path.exists():
            if not self._recover_until_damage:
                raise CheckpointError(f"the log {path} is not there, with the updates after the snapshot{_way_on()}")
            path.touch()
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            end = 0
            while (record := find_record(stream, end, self._mark)) is not None and record.number == self._next:
                stream.seek(record.text)
                text, body = stream.read(record.body - record.text), stream.read(record.tail - record.body)
                yield json.loads(text), body
                end = record.end
                self._next += 1
            if end < size:
                self._set_aside(stream, end, size)
        os.truncate(path, end)
        self._log = path.open("ab")

    def _set_aside(self, stream: BinaryIO, end: int, size: int) -> None:
        """Judges what of the log is no record: an end that was not written, or damage."""
        # Also a record that should be here and comes later, or one that is here for the second time.
        following, place = 0, end
        while (record := find_record_after(stream, place, self._mark, self._next - 1)) is not None:
            following, place = following + 1, record.end
        if not following and not ends_in_a_tail(stream, self._mark):
            _log.warning(
                "the log in %s ends in %d bytes of an update that was not written whole: left out", self, size - end
            )
            return
        damage = f"the log {self._path('log')} is damaged at byte {end} of {size}; {following} whole updates follow"
        if not self._recover_until_damage:
            raise CheckpointError(f"{damage}, which workers have been answered. Nothing was removed{_way_on()}")
        aside = self._directory / f"damaged-log-{self._number}-from-byte-{end}.bin"

        def copy(target: BinaryIO) -> None:
            stream.seek(end)
            while part := stream.read(1 << 20):
                target.write(part)

        write_atomically(aside, copy)
        _log.warning("%s: they are left out, and kept in %s", damage, aside)

    def snapshot(self, state: dict[str, Any]) -> None:
        """Writes a snapshot, from which on a new log counts."""
        number, mark = self._number + 1, secrets.token_bytes(MARK_BYTES)
        text, tensors = encode({"mark": mark.hex(), "state": state})
        parts = [bytes_of(tensor) for tensor in tensors if tensor.numel()]
        # Before the snapshot, which without its log would be one whose updates are gone.
        log = (self._directory / f"log-{number}.bin").open("wb")
        path = self._directory / f"snapshot-{number}.bin"
        try:
            write_atomically(path, lambda stream: write_record(stream, _SNAPSHOT_MARK, number, text, parts))
        except BaseException:
            log.close()
            os.unlink(log.name)
            raise
        self._number, self._mark, self._next = number, mark, 0
        self._snapshot_bytes = path.stat().st_size
        if self._log is not None:
            self._log.close()
        self._log = log
        self._remove_all_but(self._number)

    def append(self, update: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Adds an update to the log.

        Raises:
            OSError: the disk is full, or gone; the log is as it was.
        """
        start = self._log.tell()
        parts = [bytes_of(tensor) for tensor in tensors if tensor.numel()]
        try:
            write_record(self._log, self._mark, self._next, json.dumps(update).encode(), parts)
            # To the system, which keeps it when this process ends.
            self._log.flush()
        except OSError:
            # What follows a torn record would count as damage.
            self._log = _reopen(self._log, start)
            raise
        self._next += 1

    def close(self) -> None:
        """Leaves the directory to another server."""
        if self._log is not None:
            self._log.close()
        self._lock.close()

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
        kept = {f"snapshot-{number}.bin", f"log-{number}.bin"}
        for pattern in ("snapshot-*.bin", "log-*.bin", ".snapshot-*.bin.*"):
            for path in self._directory.glob(pattern):
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}-{self._number}.bin"


def fill(tensors: Sequence[Tensor], body: bytes) -> None:
    """Puts the bytes of an update into tensors like those that were given to `WriteAheadLog.append`.

    Raises:
        ValueError: they are not so many.
    """
    if len(body) != sum(tensor.nbytes for tensor in tensors):
        raise ValueError(f"an update has {len(body)} bytes, and its parameters other ones")
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        tensor.view(torch.uint8).numpy()[:] = np.frombuffer(body[start:end], dtype=np.uint8)
        start = end


def _way_on() -> str:
    return (
        ". To go on from the last update before the damage, start the server with --recover-until-damage "
        "(Server(recover_until_damage=True)), which keeps what follows in another file"
    )


def _number_of(path: Path) -> int:
    number = path.stem.partition("-")[2]
    return int(number) if number.isdecimal() else -1


def _read_into(stream: BinaryIO, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.numel() and stream.readinto(bytes_of(tensor)) != tensor.nbytes:
            raise ValueError("it ends too early")


def _reopen(log: BinaryIO, length: int) -> BinaryIO:
    """Returns the log of that length: its own buffer may still hold what could not be written."""
    path = log.name
    with contextlib.suppress(OSError):
        log.close()
    os.truncate(path, length)
    return open(path, "ab")
