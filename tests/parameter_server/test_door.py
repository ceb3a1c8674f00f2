"""Who comes to a server, and who stands at an address: strangers, other programs, and workers that go away."""

from __future__ import annotations

import json
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from lightkit.errors import ConfigError
from lightkit.parameter_server import Server
from lightkit.parameter_server.door import DOOR, Listener, Talk, connect
from lightkit.parameter_server.link import LinkError

sys.path.insert(0, str(Path(__file__).parent))
from workers import Serving, Training, stop_serving, together


@pytest.fixture(autouse=True)
def servers_end():
    yield
    stop_serving()


def stranger(serving):
    host, port = serving.addresses[0].split(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))


def knock(store, name):
    store.queue_push(DOOR, json.dumps({"name": name, "host": "127.0.0.1", "nonce": "0"}))
    return Talk(store, name)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff\xfe",
        b"[" * 3000,
        b'{"name": 1, "host": null, "nonce": []}',
        b'{"name": "x"}',
        b'{"name": "x", "host": "' + b"y" * 100_000 + b'", "nonce": ""}',
    ],
)
def test_rubbish_at_the_door(message):
    """Is taken away unheard; a worker comes in as before."""
    serving = Serving(1)
    store = stranger(serving)
    store.queue_push(DOOR, message)
    training = Training(serving.addresses, 0)
    training.step(0)
    assert store.queue_len(DOOR) == 0 and serving.servers[0]._versions == [1]
    assert set(serving.servers[0]._links) == {0}
    training.end()


@pytest.mark.parametrize("proof", ["", "guessed", "ü", "\ud800"])
def test_a_stranger_at_the_door(proof):
    """Whoever does not know the secret is told so, and no connection is made that could be sent anything by."""
    serving = Serving(1)
    talk = knock(stranger(serving), "link/stranger")
    talk.hear("greeting", "nonce", "version")
    talk.say("hello", proof=proof, version="1")
    assert "the secret is not that of the server" in talk.hear("answer")["error"]
    training = Training(serving.addresses, 0)
    training.step(0)
    training.end()


def test_a_slow_worker_hears_why_it_is_refused(caplog):
    """The answer waits for it, though the server has long turned to others."""
    serving = Serving(1)
    talk = knock(stranger(serving), "link/slow")
    talk.hear("greeting")
    talk.say("hello", proof="guessed", version="1")
    end = time.monotonic() + 10
    while "another secret" not in caplog.text and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    assert "the secret is not that of the server" in talk.hear("answer")["error"]


def test_who_knocks_and_goes_away():
    """Nobody waits for those that say nothing more: neither a worker that comes, nor one that trains."""
    serving = Serving(1)
    training = Training(serving.addresses, 0, workers=2)
    store = stranger(serving)
    for number in range(3):
        knock(store, f"link/gone{number}")
    started = time.monotonic()
    second = Training(serving.addresses, 1, workers=2)
    together(lambda: training.step(0), lambda: second.step(0))
    # A handshake is given up after ten seconds, each of them.
    assert time.monotonic() - started < 8
    together(training.end, second.end)


def test_a_stranger_at_the_address():
    """Whoever listens without knowing the secret gets no gradient."""
    impostor = Listener("127.0.0.1", 0, "what it guesses")

    def lie():
        try:
            impostor.connect(impostor.accept(10))
        except LinkError:
            return "refused"

    def work():
        with pytest.raises(ConfigError, match="the secret is not that of the server"):
            connect(f"127.0.0.1:{impostor.port}", "the real one", {}, 5, 5)

    assert together(lie, work)[0] == "refused"


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("nowhere.invalid:29600", LinkError, "cannot be reached"),
        ("127.0.0.1:1", LinkError, "127.0.0.1:1 cannot be reached: Connection refused"),
        ("127.0.0.1", ConfigError, "must be HOST:PORT"),
        ("127.0.0.1:0", ConfigError, "must be HOST:PORT"),
    ],
)
def test_nobody_there(address, error, message):
    """A wrong address is an error within the patience, which names it."""
    started = time.monotonic()
    with pytest.raises(error, match=message):
        connect(address, "secret", {}, 1.0, 1.0)
    assert time.monotonic() - started < 10


def test_another_program_at_the_port():
    """Something that listens but is no parameter server does not make the worker wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        started = time.monotonic()
        with pytest.raises(LinkError, match="does not answer as one"):
            connect(f"127.0.0.1:{other.getsockname()[1]}", "secret", {}, 1.0, 1.0)
        assert time.monotonic() - started < 25


def test_two_servers_on_one_port():
    """The second does not come up."""
    serving = Serving(1)
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
        Server(port=serving.servers[0].listener.port, secret="x")
