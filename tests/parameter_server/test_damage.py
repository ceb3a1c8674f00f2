"""Recovery from incomplete and damaged files."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import subprocess
import sys

import pytest
import torch
from workers import SECRET, Serving, Training, stop_serving

from lightkit.errors import CheckpointError
from lightkit.parameter_server import Server
from lightkit.parameter_server.write_ahead_log import WriteAheadLog

UPDATES = 12


def gradient(number):
    return [torch.full((50,), float(number)), torch.arange(30.0) * number]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns a directory with a snapshot and a log, and the byte at which each update ends."""
    directory = tmp_path_factory.mktemp("whole") / "server"
    log = WriteAheadLog(directory)
    log.snapshot({"number": 0, "weights": torch.arange(100.0), "workers": {"0": [1, 2.5, None, True]}})
    ends = []
    for number in range(UPDATES):
        log.append({"number": number}, gradient(number))
        ends.append(log._log.tell())
    log.close()
    return directory, ends


def copy_of(directory, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    (path,) = target.glob("log-*.bin")
    return path


@contextlib.contextmanager
def opened(directory, **options):
    log = WriteAheadLog(directory, **options)
    try:
        yield log
    finally:
        log.close()


def replayed(directory, **options):
    """Returns the numbers of the replayed updates, after a check of their tensors; appends an update."""
    with opened(directory, **options) as log:
        assert log.load()["number"] == 0
        numbers = []
        for update, body in log.replay():
            assert body == b"".join(t.numpy().tobytes() for t in gradient(update["number"]))
            numbers.append(update["number"])
        # The log continues from there.
        log.append({"number": 99}, gradient(99))
    return numbers


def check_appended(directory, numbers):
    with opened(directory) as log:
        log.load()
        assert [update["number"] for update, _ in log.replay()] == [*numbers, 99]


def content_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("rest", ["nothing", "zeros", "many zeros"])
def test_an_incomplete_log(whole, tmp_path, rest):
    """The complete updates count, at whatever byte the log ends, with or without zeros as after a loss of power."""
    directory, ends = whole
    rng = random.Random(17)
    size = ends[-1]
    cuts = {0, 1, 7, 8, size - 1, size - 12, *(end + d for end in ends[:-1] for d in (-1, 0, 1, 33))}
    cuts |= {rng.randrange(size) for _ in range(100)}
    zeros = {"nothing": 0, "zeros": 37, "many zeros": 100_000}[rest]
    for cut in sorted(cuts):
        path = copy_of(directory, tmp_path / "server")
        path.write_bytes(path.read_bytes()[:cut] + bytes(zeros))
        expected = [number for number, end in enumerate(ends) if end <= cut]
        assert replayed(tmp_path / "server") == expected, cut
        check_appended(tmp_path / "server", expected)


def test_a_complete_log_with_zeros(whole, tmp_path):
    """All updates count."""
    path = copy_of(whole[0], tmp_path / "server")
    with path.open("ab") as stream:
        stream.write(bytes(4096))
    assert replayed(tmp_path / "server") == list(range(UPDATES))


def flipped(data, rng, until):
    at = rng.randrange(until)
    data[at] ^= 1 << rng.randrange(8)
    return at


def zeroed(data, rng, until):
    at = rng.randrange(until - 64)
    data[at : at + 64] = bytes(64)
    return at


def exchanged(data, rng, until):
    at = rng.randrange(until - 200)
    data[at : at + 100], data[at + 100 : at + 200] = data[at + 100 : at + 200], data[at : at + 100]
    return at


def left_out(data, rng, until):
    at = rng.randrange(until - 64)
    del data[at : at + rng.randrange(1, 64)]
    return at


def put_in(data, rng, until):
    at = rng.randrange(until)
    data[at:at] = rng.randbytes(rng.randrange(1, 64))
    return at


@pytest.mark.parametrize("how", [flipped, zeroed, exchanged, left_out, put_in])
def test_damage_in_the_middle_of_a_log(whole, tmp_path, how, caplog):
    """The error is one line and changes no file; with recover_until_damage the updates before the damage count."""
    caplog.set_level(logging.CRITICAL)
    directory, ends = whole
    # The last record stays whole.
    until = ends[-2]
    for seed in range(120):
        rng = random.Random(seed)
        path = copy_of(directory, tmp_path / "server")
        data = bytearray(path.read_bytes())
        original = bytes(data)
        how(data, rng, until)
        if bytes(data) == original:
            continue
        at = next(i for i, (a, b) in enumerate(zip(data, original, strict=False)) if a != b)
        path.write_bytes(data)
        before = content_of(tmp_path / "server")
        with pytest.raises(CheckpointError, match=r"is damaged at byte \d+ of \d+; \d+ whole updates follow") as caught:
            replayed(tmp_path / "server")
        assert "--recover-until-damage" in str(caught.value) and "\n" not in str(caught.value)
        assert content_of(tmp_path / "server") == before, seed
        good = [number for number, end in enumerate(ends) if end <= at]
        assert replayed(tmp_path / "server", recover_until_damage=True) == good, seed
        (aside,) = (tmp_path / "server").glob("damaged-log-0-from-byte-*.bin")
        kept = ends[len(good) - 1] if good else 0
        assert aside.read_bytes() == bytes(data)[kept:]
        check_appended(tmp_path / "server", good)


def test_damage_of_the_last_update(whole, tmp_path):
    """A worker has the reply: a flipped bit in the last update is damage, and no incomplete record."""
    directory, ends = whole
    rng = random.Random(5)
    for _ in range(60):
        path = copy_of(directory, tmp_path / "server")
        data = bytearray(path.read_bytes())
        # Keeps the trailer, which shows that the record was written to its end.
        data[rng.randrange(ends[-2], ends[-1] - 8)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="0 whole updates follow"):
            replayed(tmp_path / "server")
        assert path.read_bytes() == data


def test_a_missing_log(whole, tmp_path):
    """The server does not recover from the snapshot alone, unless recover_until_damage is set."""
    copy_of(whole[0], tmp_path / "server").unlink()
    with pytest.raises(CheckpointError, match=r"log-0\.bin is missing.*--recover-until-damage"):
        replayed(tmp_path / "server")
    assert replayed(tmp_path / "server", recover_until_damage=True) == []


def test_pushed_bytes_are_no_record(whole, tmp_path):
    """Pushed bytes with the updates of another log are not found behind an incomplete record."""
    directory, _ = whole
    other = tmp_path / "other"
    path = copy_of(directory, other)
    fake = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    with opened(tmp_path / "server") as log:
        log.snapshot({"number": 0})
        log.append({"number": 0}, gradient(0))
        end = log._log.tell()
        log.append({"number": 1}, [fake])
    path = tmp_path / "server" / "log-0.bin"
    path.write_bytes(path.read_bytes()[:-5])
    assert replayed(tmp_path / "server") == [0]
    assert path.stat().st_size > end


@pytest.mark.parametrize("how", ["flip", "truncate", "zeros", "extend", "swap"])
def test_damage_of_a_snapshot(whole, tmp_path, how):
    """Each damage gives one clear error, and changes no file."""
    directory, _ = whole
    copy_of(directory, tmp_path / "server")
    path = tmp_path / "server" / "snapshot-0.bin"
    original = path.read_bytes()
    for seed in range(150):
        rng, data = random.Random(seed), bytearray(original)
        if how == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == "truncate":
            del data[rng.randrange(len(data)) :]
        elif how == "zeros":
            at = rng.randrange(len(data))
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        elif how == "extend":
            data += rng.randbytes(rng.randrange(1, 100))
        else:
            data[:200], data[200:400] = data[200:400], data[:200]
        if data == original:
            continue
        path.write_bytes(data)
        before = content_of(tmp_path / "server")
        match = r"the snapshot .*snapshot-0\.bin is damaged: .* begin anew"
        with opened(tmp_path / "server") as log, pytest.raises(CheckpointError, match=match) as caught:
            log.load()
        assert "\n" not in str(caught.value)
        assert content_of(tmp_path / "server") == before


@pytest.mark.parametrize("name", ["snapshot-3.pt", "snapshot-0.pt"])
def test_a_directory_of_an_earlier_release(tmp_path, name):
    """The error is one line, and leaves the files, which have no checksums, as they are."""
    (tmp_path / name).write_bytes(b"a zip of torch")
    with pytest.raises(CheckpointError, match=r"earlier release of lightkit.*end that training with the release") as e:
        WriteAheadLog(tmp_path)
    assert "\n" not in str(e.value) and (tmp_path / name).read_bytes() == b"a zip of torch"


@pytest.mark.parametrize(
    "state",
    [
        [],
        {},
        {"job": {}},
        {"job": None, "options": []},
        {"job": {"tables": []}, "options": 3, "shards": [], "versions": [], "workers": {}},
        {"job": {"tables": []}, "options": [], "shards": [1], "versions": [], "workers": {}},
        {"job": {"tables": []}, "options": [], "shards": [], "versions": [], "workers": [1]},
        {"job": {"tables": []}, "options": [], "shards": [], "versions": [], "workers": {"x": {}}},
        {"job": {"tables": []}, "options": [], "shards": [], "versions": [], "workers": {"0": {"rank": 1}}},
    ],
    ids=str,
)
def test_a_snapshot_of_something_else(tmp_path, state):
    """A valid record with another content gives one error."""
    with opened(tmp_path / "server") as log:
        log.snapshot(state)
    with pytest.raises(CheckpointError, match="cannot recover from the snapshot") as caught:
        Server(directory=tmp_path / "server")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the directory of a server that was stopped during a training, and its parameters."""
    directory = tmp_path_factory.mktemp("trained") / "server"
    serving = Serving(directory=directory)
    training = Training(serving.addresses, 0, mode="async")
    for step in range(6):
        training.step(step)
    stop_serving()
    training.client.abandon()
    return directory, torch.cat([p.detach().flatten() for p in training.parameters])


def test_a_server_recovers_from_a_log_with_zeros(trained, tmp_path):
    """All complete updates count, as after a loss of power."""
    directory, weights = trained
    path = copy_of(directory, tmp_path / "server")
    with path.open("ab") as stream:
        stream.write(bytes(5000))
    server = Server(directory=tmp_path / "server")
    server.listener.close()
    assert server.status().versions == (6,) and torch.equal(server._training.state.shards[0].flats[0], weights)


def test_a_server_stops_at_damage(trained, tmp_path):
    """The command reports damage and remedy in one line; with recover_until_damage the server recovers."""
    path = copy_of(trained[0], tmp_path / "server")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    command = [sys.executable, "-m", "lightkit.parameter_server", "--port", "0", "--directory", str(path.parent)]
    environment = {"LIGHTKIT_SECRET": SECRET, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "listening" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "is damaged at byte" in line and "--recover-until-damage" in line and "Traceback" not in result.stderr
    assert path.read_bytes() == data
    with pytest.raises(CheckpointError, match="is damaged at byte"):
        Server(directory=path.parent)
    server = Server(directory=path.parent, recover_until_damage=True)
    server.listener.close()
    assert server.status().versions[0] in (2, 3)
    assert len(list(path.parent.glob("damaged-log-*.bin"))) == 1


def test_keys_of_the_files(trained, tmp_path):
    """Snapshots and logs keep their keys from release to release: a new server recovers from old files."""
    copy_of(trained[0], tmp_path / "server")
    with opened(tmp_path / "server") as log:
        state = log.load()
        (update, *_) = [update for update, _ in log.replay()]
    assert state.keys() == {"job", "options", "shards", "versions", "workers"}
    settings = {"workers", "mode", "staleness", "compression", "fraction", "snapshot_every"}
    assert state["job"].keys() == {"tables", *settings}
    (optimizer,) = state["job"]["tables"]
    assert optimizer.keys() == {"optimizer", "parameters", "numbers"}
    assert optimizer["parameters"][0] == {"name": "0.weight", "shape": [8, 5], "dtype": "float32", "group": 0}
    assert optimizer["numbers"] == [[[name, -1] for name in ("dampening", "lr", "momentum", "weight_decay")]]
    assert state["shards"][0].keys() == {"flats", "state", "seeds"}
    assert state["workers"]["0"].keys() == {"incarnation", "pushes", "ahead", "finished", "left"}
    assert update.keys() == {"table", "skip", "numbers", "present", "pushes"}
    assert update["pushes"]["0"] == [state["workers"]["0"]["incarnation"], 1, [0]]
