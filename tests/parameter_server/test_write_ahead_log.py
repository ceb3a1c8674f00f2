"""The write-ahead log: of one server, no longer than needed, and complete after any failure."""

from __future__ import annotations

import shutil

import pytest
import torch
from workers import Serving, Training, stop_serving

import lightkit.parameter_server.write_ahead_log as module
from lightkit.errors import ConfigError
from lightkit.parameter_server import Server
from lightkit.parameter_server.write_ahead_log import WriteAheadLog

GRADIENT = [torch.arange(1000.0)]


def updates(directory):
    log = WriteAheadLog(directory)
    log.load()
    return [update["number"] for update, _ in log.replay()]


def test_one_server_for_each_directory(tmp_path):
    """A second server gets an error, and does not write to the log of the first."""
    first = WriteAheadLog(tmp_path / "place")
    with pytest.raises(ConfigError, match=r"another parameter server has the directory .*place"):
        WriteAheadLog(tmp_path / "place")
    first.clear()
    assert not (tmp_path / "place").exists()


def test_other_users_have_no_access(tmp_path):
    """The directory is for its user alone."""
    log = WriteAheadLog(tmp_path / "place")
    log.snapshot({})
    assert (tmp_path / "place").stat().st_mode & 0o077 == 0


def test_an_interrupted_snapshot(tmp_path):
    """A server that ends before the removal of the old snapshot recovers from the new one."""
    log = WriteAheadLog(tmp_path)
    log.snapshot({"number": 0})
    log.append({"number": 1}, GRADIENT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    log.snapshot({"number": 2})
    log._lock.close()
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".snapshot-8.bin.abcd").write_bytes(b"half")
    again = WriteAheadLog(tmp_path)
    # The server removes files after it has checked the rest.
    assert len(list(tmp_path.iterdir())) == 6
    assert again.load() == {"number": 2} and not list(again.replay())
    assert {path.name for path in tmp_path.iterdir()} == {"snapshot-1.bin", "log-1.bin", "lock"}
    again.clear()
    assert not tmp_path.exists()


class Full:
    """A log on a disk with room for ``room`` bytes."""

    def __init__(self, log, room):
        self._log, self._room = log, room

    def write(self, data):
        taken = bytes(data)[: self._room]
        self._room -= len(taken)
        self._log.write(taken)
        if len(taken) < len(data):
            self._log.flush()
            raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self._log, name)


@pytest.mark.parametrize("room", [0, 10, 50, 2000])
def test_a_full_disk(tmp_path, room):
    """An update that does not fit gives an error, and the later updates count."""
    log = WriteAheadLog(tmp_path)
    log.snapshot({})
    log.append({"number": 1}, GRADIENT)
    log._log = Full(log._log, room)
    with pytest.raises(OSError, match="No space left"):
        log.append({"number": 2}, GRADIENT)
    log.append({"number": 3}, GRADIENT)
    log._lock.close()
    assert updates(tmp_path) == [1, 3]


def test_a_snapshot_that_does_not_fit(tmp_path, monkeypatch):
    """The server recovers from the earlier snapshot and its log."""
    log = WriteAheadLog(tmp_path)
    log.snapshot({"number": 0})

    def full(*unused):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            log.snapshot({"number": 1})
    log.append({"number": 2}, GRADIENT)
    log._lock.close()
    again = WriteAheadLog(tmp_path)
    assert again.load() == {"number": 0}
    assert [update for update, _ in again.replay()] == [{"number": 2}]


def test_the_log_does_not_fill_the_disk(tmp_path, monkeypatch):
    """A snapshot replaces a long log before 1000 updates, and a server recovers from it."""
    monkeypatch.setattr(module, "_MIN_LOG_BYTES", 0)
    serving = Serving(directory=tmp_path / "server")
    try:
        training = Training(serving.addresses, 0, mode="async", snapshot_every=1000)
        largest = 0
        for step in range(150):
            training.step(step)
            largest = max(largest, sum(path.stat().st_size for path in (tmp_path / "server").iterdir()))
        (snapshot,) = (tmp_path / "server").glob("snapshot-*.bin")
        assert int(snapshot.stem.partition("-")[2]) > 0
        assert largest < 12 * snapshot.stat().st_size
        shutil.copytree(tmp_path / "server", tmp_path / "copy")
        recovered = Server(directory=tmp_path / "copy")
        flat = torch.cat([p.detach().flatten() for p in training.parameters])
        assert torch.equal(recovered._training.state.shards[0].flats[0], flat)
        assert recovered.status().versions == (150,)
        training.end()
        serving.threads[0].join(20)
    finally:
        stop_serving()
    assert not (tmp_path / "server").exists()
