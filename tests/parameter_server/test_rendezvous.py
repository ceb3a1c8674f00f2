"""Connections to a server before and during the handshake: strangers, other programs, and impostors."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from datetime import timedelta

import hostile
import pytest
import torch
from torch.distributed import TCPStore
from workers import SECRET, Serving, Training, reference, together

from lightkit.errors import ConfigError
from lightkit.parameter_server import Server
from lightkit.parameter_server import rendezvous as module
from lightkit.parameter_server.durable_state import DurableState
from lightkit.parameter_server.rendezvous import Handshake, Listener, connect
from lightkit.parameter_server.transport import ProtocolError, TransportError


@contextlib.contextmanager
def listening(secret="the secret", timeout=5.0):
    """Yields a listener that a thread serves, its address, and the list of accepted connections."""
    listener, accepted, over = Listener("127.0.0.1", 0, secret, timeout), [], threading.Event()
    listener.listen()

    def run():
        while not over.is_set():
            if (connection := listener.accept(0.05)) is not None:
                accepted.append(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield listener, f"127.0.0.1:{listener.port}", accepted
    over.set()
    thread.join(5)
    assert not thread.is_alive()
    listener.close()


def test_the_port_is_no_store():
    """A client of torch's TCPStore fails: the server has no store that a stranger could change."""
    serving = Serving(1)
    host, port = serving.addresses[0].split(":")

    def come():
        with pytest.raises(RuntimeError):
            store = TCPStore(
                host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(milliseconds=300)
            )
            store.set("alive/0", "forged")
            store.num_keys()

    training = Training(serving.addresses, 0)
    together(come, lambda: training.step(0))
    training.end()


@pytest.mark.parametrize("what", sorted(hostile.STRANGERS))
def test_strangers(what, monkeypatch):
    """No stranger causes a thread or a lasting connection, or makes a worker wait."""
    serving = Serving(1)
    (server,) = serving.servers
    training = Training(serving.addresses, 0)
    training.step(0)
    monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT", 0.2)
    threads = threading.active_count()
    for seed in range(5):
        hostile.STRANGERS[what](serving.addresses[0], random.Random(seed))
    assert threading.active_count() <= threads
    for step in range(1, 12):
        training.step(step)
    assert torch.equal(training.end()[0], reference()[0])
    assert set(server.status().workers) == {0}


@pytest.mark.parametrize("count", [module.MAX_CONNECT_REQUESTS, 3 * module.MAX_CONNECT_REQUESTS])
def test_silent_strangers(count):
    """Any number of silent connections has no thread, and a worker connects between them."""
    serving = Serving(1)
    listener = serving.servers[0].listener
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(hostile.stranger(serving.addresses[0]))
        end = time.monotonic() + 10
        while len(listener._requests) < module.MAX_CONNECT_REQUESTS:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert threading.active_count() == threads
        started = time.monotonic()
        training = Training(serving.addresses, 0)
        training.step(0)
        # The worker does not wait for the timeout of earlier connections.
        assert time.monotonic() - started < 8
        assert len(listener._requests) <= module.MAX_CONNECT_REQUESTS
    training.end()


def test_the_busiest_address_loses_connections():
    """With too many connections, the address with the most loses its oldest."""
    with listening() as (listener, _, _):
        patient = socket.create_connection(("127.0.0.1", listener.port), source_address=("127.0.0.2", 0))
        hostile.challenge_of(patient)
        others = [
            socket.create_connection(("127.0.0.1", listener.port)) for _ in range(2 * module.MAX_CONNECT_REQUESTS)
        ]
        # The listener has admitted the last connection.
        assert hostile.challenge_of(others[-1]) and len(listener._requests) >= module.MAX_CONNECT_REQUESTS - 1
        assert patient.getsockname() in [r.socket.getpeername() for r in list(listener._requests.values())]
        for connected in (patient, *others):
            connected.close()


def test_the_handshake_has_a_timeout(monkeypatch, caplog):
    """The listener drops a peer without a proof after the timeout, even if the peer sends a byte now and then."""
    monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT", 0.5)
    with listening() as (listener, address, _), hostile.stranger(address) as connected:
        hostile.challenge_of(connected)
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - started < 5:
                connected.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - started < 3 and not listener._requests
    assert "did not prove within 0.5 s that it knows the secret" in caplog.text


def test_strangers_cannot_flood_the_log(caplog):
    """The listener logs at most one warning a second, however many strangers connect."""
    caplog.set_level(logging.WARNING)
    with listening() as (_, address, _):
        started = time.monotonic()
        for seed in range(100):
            hostile.guesses(address, random.Random(seed))
        seconds = time.monotonic() - started
    lines = [r for r in caplog.records if "another secret" in r.getMessage()]
    assert 1 <= len(lines) <= seconds + 1


def test_a_proof_cannot_be_used_again():
    """The server rejects a recorded proof, and its own proof sent back."""
    with listening() as (_, address, accepted):
        with hostile.stranger(address) as connected:
            challenge = hostile.challenge_of(connected)
            handshake = Handshake("the secret", challenge, bytes(32))
            hello = module._RESPONSE.pack(bytes(32), handshake.proof("worker"))
            connected.sendall(hello)
            answer = connected.recv(module._VERDICT.size, socket.MSG_WAITALL)
            assert module._VERDICT.unpack(answer) == (module._ACCEPTED, handshake.proof("server"))
        for proof in (handshake.proof("worker"), handshake.proof("server"), b"", b"\xff" * 32):
            with hostile.stranger(address) as connected:
                hostile.challenge_of(connected)
                connected.sendall(module._RESPONSE.pack(bytes(32), proof))
                answer = connected.recv(module._VERDICT.size, socket.MSG_WAITALL)
                assert module._VERDICT.unpack(answer) == (module._WRONG_SECRET, bytes(32))
    assert len(accepted) == 1


def test_a_relay_of_the_handshake_cannot_send(monkeypatch):
    """A stranger that relays the handshake of a worker and a server has no key to sign frames."""
    with listening(timeout=2.0) as (_, address, accepted):
        between = socket.create_server(("127.0.0.1", 0))

        def pass_on():
            worker, _ = between.accept()
            with hostile.stranger(address) as server:
                for one, other, count in (
                    (server, worker, module._CHALLENGE.size),
                    (worker, server, module._RESPONSE.size),
                    (server, worker, module._VERDICT.size),
                ):
                    other.sendall(one.recv(count, socket.MSG_WAITALL))
                forged = b"\x00" + bytes(8) + bytes(16)
                server.sendall(forged)
                time.sleep(0.5)
            worker.close()

        together(pass_on, lambda: connect(f"127.0.0.1:{between.getsockname()[1]}", "the secret", {}, 5, 5))
        between.close()
        with pytest.raises(ProtocolError, match="not signed by the peer"):
            accepted[0].receive_header()


def test_no_connection_before_the_recovery(tmp_path, monkeypatch):
    """A restarted server listens after its recovery; a worker waits for that."""
    serving = Serving(1, directory=tmp_path / "server")
    port = serving.servers[0].listener.port
    training = Training(serving.addresses, 0)
    training.step(0)
    serving.stop()
    recover, refused = DurableState.recover, []

    def slowly(state):
        with pytest.raises(ConnectionRefusedError):
            hostile.stranger(f"127.0.0.1:{port}")
        refused.append(True)
        time.sleep(0.5)
        return recover(state)

    monkeypatch.setattr(DurableState, "recover", slowly)

    def come_back():
        server = Server(port=port, secret=SECRET, timeout=5.0, directory=tmp_path / "server")
        server.run()

    together(come_back, lambda: (training.step(1), training.end()))
    assert refused == [True]


def test_an_impostor_without_the_secret():
    """A listener without the secret gets no gradient."""
    with listening("what it guesses") as (_, address, accepted):
        with pytest.raises(ConfigError, match="the secret is not that of the server"):
            connect(address, "the real one", {}, 5, 5)
        assert not accepted


def test_an_impostor_that_accepts_every_proof():
    """The worker demands a proof of the server too."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def lie():
            connected, _ = other.accept()
            with connected:
                connected.sendall(module._CHALLENGE.pack(module._MAGIC, module._version(), bytes(32)))
                connected.recv(module._RESPONSE.size, socket.MSG_WAITALL)
                connected.sendall(module._VERDICT.pack(module._ACCEPTED, b"guessed"))

        def work():
            with pytest.raises(ConfigError, match="does not know the secret"):
                connect(f"127.0.0.1:{other.getsockname()[1]}", "the real one", {}, 5, 5)

        together(lie, work)


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("nowhere.invalid:29600", TransportError, "cannot be reached"),
        ("127.0.0.1:1", TransportError, "127.0.0.1:1 cannot be reached: Connection refused"),
        ("127.0.0.1", ConfigError, "must be HOST:PORT"),
        ("127.0.0.1:0", ConfigError, "must be HOST:PORT"),
    ],
)
def test_an_address_without_a_server(address, error, message):
    """The error comes within the patience, and names the address."""
    started = time.monotonic()
    with pytest.raises(error, match=message):
        connect(address, "secret", {}, 1.0, 1.0)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("text", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10, bytes(5000)])
def test_another_program_that_replies(text):
    """The error is one line, whatever the program sends."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connected, _ = other.accept()
            connected.sendall(text)
            connected.close()

        def work():
            with pytest.raises(TransportError, match=r"does not answer as one.*is that another program") as caught:
                connect(f"127.0.0.1:{other.getsockname()[1]}", "secret", {}, 1.0, 1.0)
            assert "\n" not in str(caught.value)

        together(answer, work)


def test_another_program_at_the_port(monkeypatch):
    """A silent program at the address does not make the worker wait for ever."""
    monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        started = time.monotonic()
        with pytest.raises(TransportError, match="does not answer as one"):
            connect(f"127.0.0.1:{other.getsockname()[1]}", "secret", {}, 1.0, 1.0)
        assert time.monotonic() - started < 25


def test_two_servers_on_one_port():
    """The second server does not come up."""
    serving = Serving(1)
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
        Server(port=serving.servers[0].listener.port, secret="x")
