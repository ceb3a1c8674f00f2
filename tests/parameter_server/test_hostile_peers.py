"""Peers that have the secret and send what nobody expects: it costs their own connection, and nobody else's."""

from __future__ import annotations

import random
import secrets
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server import Client, group_options
from lightkit.parameter_server.protocol import Reply, Request
from lightkit.parameter_server.rendezvous import Listener
from lightkit.parameter_server.transport import TransportError

sys.path.insert(0, str(Path(__file__).parent))
import hostile
from workers import (
    SECRET,
    ServerProcess,
    Serving,
    Training,
    network,
    reference,
    sgd,
    spec_of,
    stop_serving,
    together,
)


@pytest.fixture(autouse=True)
def servers_end():
    yield
    stop_serving()


def description(rank=1, **settings):
    """What a worker of the tests says of itself."""
    model = network()
    spec = spec_of(model, sgd(model.parameters()), **settings)
    return {"rank": rank, "incarnation": secrets.token_hex(8), "timeout": 5.0, "job": spec.to_json()}


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("numbers", [5_000_000, 10])
def test_a_push_of_another_size(numbers):
    """Of 5,000,000 numbers where 75 are expected, or of 10: the server goes on, and the other worker with it."""
    server = ServerProcess()
    try:
        honest = Training([server.address], 0, workers=2, mode="async")
        honest.step(0)
        bad = Training([server.address], 1, workers=2, mode="async", patience=1.0)
        bad.client._sessions[0].buffers[0].payload = [torch.zeros(numbers)]
        with pytest.raises(ConfigError, match=rf"a tensor of {4 * numbers} bytes came where one of 300 was expected"):
            together(lambda: bad.client.push(0, bad.gradients(0), bad.optimizer.param_groups).result(), timeout=10)
        bad.client.abandon()
        for step in range(1, 4):
            honest.step(step)
        honest.end()
        assert server.process.wait(20) == 0
    finally:
        server.stop()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("what", sorted(hostile.WORKERS))
def test_a_worker_that_does_not_do_what_it_should(what, seed):
    """Another worker trains meanwhile, to the same weights as without it: nothing of it counted."""
    serving = Serving(1, timeout=2.0)
    (server,) = serving.servers
    settings = {"workers": 1, "mode": "async", "timeout": 2.0}
    honest = Training(serving.addresses, 0, **settings)
    honest.step(0)
    peer = hostile.Joined(serving.addresses[0], SECRET, description(workers=1, mode="async"))
    hostile.WORKERS[what](peer, random.Random(seed))
    for step in range(1, 12):
        honest.step(step)
    # It sends no signs of life: what has not been sent away ends by that.
    until(lambda: server.status().connected == {0})
    peer.connection.close()
    until(lambda: server.status().sessions == 1)
    weights, _ = honest.end()
    assert torch.equal(weights, reference()[0])
    serving.threads[0].join(10)
    assert not serving.threads[0].is_alive() and server.status().versions == (12,)


@pytest.mark.parametrize("what", ["large_push", "unknown_request", "unknown_optimizer", "begins_again", "huge_tensor"])
def test_it_is_told_why(what):
    """A worker that is sent away hears what was wrong, where it reads."""
    serving = Serving(1)
    honest = Training(serving.addresses, 0, mode="async")
    peer = hostile.Joined(serving.addresses[0], SECRET, description(mode="async"))
    if what == "large_push":
        # So few that all of it is read by the system.
        peer.push(count=peer.count + 1)
    else:
        hostile.WORKERS[what](peer, random.Random(0))
    answer = peer.hear()
    assert answer is None or answer[0] == Reply.REFUSED
    honest.end()


def test_hellos_that_are_none():
    """Each is refused in seconds, and the next worker joins; none of them is remembered."""
    serving = Serving(1)
    (server,) = serving.servers
    honest = Training(serving.addresses, 0, workers=2, mode="async")
    for name, who in hostile.join_requests(description(workers=2, mode="async")).items():
        started = time.monotonic()
        with pytest.raises((TransportError, KeyError, AssertionError)):
            connection = hostile.connect(serving.addresses[0], SECRET, who, 5.0, 5.0)
            assert connection.receive_header()[0] == Reply.OK, name
        assert time.monotonic() - started < 5, name
    until(lambda: server.status().connected == {0})
    assert server.status().workers.keys() == {0}
    together(lambda: honest.step(0))
    second = Training(serving.addresses, 1, workers=2, mode="async")
    together(lambda: second.step(1))
    together(honest.end, second.end)


@pytest.mark.parametrize(
    "change",
    [
        {"options": 7},
        {"options": [[3]]},
        {"options": [[{}]]},
        {"options": []},
        {"values": [[1, 2, 3, 4]]},
        {"values": [[]]},
        {"values": [[torch.zeros(3)] * 4]},
        {"values": None},
        {"state": None},
        {"state": [[1]]},
        {"job": None},
        {"job": {}},
    ],
    ids=str,
)
def test_a_job_that_cannot_begin(change, tmp_path):
    """The worker is told, and the server begins with the next that can."""
    serving = Serving(1, directory=tmp_path / "server")
    good = description(rank=0)
    peer = hostile.Joined(serving.addresses[0], SECRET, good)
    model = network()
    start = {
        "job": good["job"],
        "options": [group_options(sgd(model.parameters()))],
        "values": [[p.detach() for p in model.parameters()]],
        "state": [[]],
    }
    peer.connection.send_header(Request.BEGIN)
    peer.connection.send_message({**start, **change})
    answer = peer.hear()
    assert answer is None or answer[0] == Reply.REFUSED
    until(lambda: not serving.servers[0].status().connected)
    training = Training(serving.addresses, 0)
    assert training.begun
    training.step(0)
    training.end()


def test_pushes_again_and_of_any_number():
    """Numbers that were there count once; what one worker says of its own pushes changes nothing for another."""
    serving = Serving(1)
    (server,) = serving.servers
    honest = Training(serving.addresses, 0, workers=1, mode="bounded", staleness=2)
    peer = hostile.Joined(serving.addresses[0], SECRET, description(workers=1, mode="bounded", staleness=2))
    for number in (1, 1, 0, -(2**63), 1):
        peer.push(number)
        peer.connection.receive_header()
        peer.connection.receive(torch.zeros(peer.count))
    assert server.status().versions == (1,)
    peer.push(2**63 - 1)
    until(lambda: server.status().versions == (2,))
    together(lambda: [honest.step(step) for step in range(3)])
    honest.end()


def test_who_leaves_in_the_middle_does_not_end_the_job(tmp_path):
    """A worker that says that it leaves, and has not finished, counts as lost; nothing is removed."""
    serving = Serving(1, directory=tmp_path / "server", timeout=3.0)
    honest = Training(serving.addresses, 0, workers=1, mode="async")
    honest.step(0)
    peer = hostile.Joined(serving.addresses[0], SECRET, description(workers=1, mode="async"))
    peer.connection.send_header(Request.LEAVE)
    until(lambda: serving.servers[0].status().connected == {0})
    # Its network breaks for a moment.
    honest.client._sessions[0]._connection.close()
    until(lambda: not serving.servers[0].status().connected)
    time.sleep(0.5)
    assert serving.threads[0].is_alive() and list((tmp_path / "server").glob("snapshot-*"))
    honest.step(1)
    honest.end()


def test_a_push_of_a_worker_that_has_finished():
    """Is refused: the others' steps have been without it."""
    serving = Serving(1)
    training = Training(serving.addresses, 0, mode="async")
    training.step(0)
    training.client.finish()
    with pytest.raises(LightkitError, match="pushes no more"):
        training.step(1)
    assert serving.servers[0].status().versions == (1,)
    training.client.abandon()


def test_a_trickle_is_no_push(monkeypatch):
    """A byte now and then is not a sign of life for ever: the others of a sync step go on without it."""
    monkeypatch.setattr("lightkit.parameter_server.transport._MIN_BYTES_PER_SECOND", 1 << 40)
    serving = Serving(1, timeout=1.0)
    honest = Training(serving.addresses, 0, workers=2, timeout=1.0)
    peer = hostile.Joined(serving.addresses[0], SECRET, description(workers=2))
    peer.connection.send_header(Request.PUSH, 0, 1, 0)
    over = threading.Event()

    def trickle():
        try:
            peer.frame(hostile.FrameKind.TENSOR, peer.metadata.nbytes)
            while not over.wait(0.2):
                peer.connection._socket.sendall(b"\0")
        except OSError:
            pass

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    together(lambda: honest.step(0), timeout=10)
    over.set()
    thread.join(5)
    honest.end()


def test_waits_are_said_also_where_much_changes():
    """A worker that waits hears so in time, although others push all the while."""
    serving = Serving(1, timeout=1.0)
    busy = Training(serving.addresses, 0, workers=2, mode="async", timeout=1.0)
    waits = Training(serving.addresses, 1, workers=2, mode="async", timeout=1.0)
    before = waits.client._sessions[0]._connection
    waiting = threading.Thread(target=waits.client.finish, daemon=True)
    waiting.start()
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        busy.step(0)
    assert waits.client._sessions[0]._connection is before
    busy.client.finish()
    waiting.join(10)
    waits.client.leave()
    busy.client.leave()


def test_a_failed_step_is_not_in_the_log(tmp_path, monkeypatch):
    """One push that the optimizer cannot take must not fail again each time that the server comes back."""
    from lightkit.parameter_server import Server
    from lightkit.parameter_server.shard import Shard

    serving = Serving(1, directory=tmp_path / "server")
    training = Training(serving.addresses, 0, mode="async")
    training.step(0)
    real = Shard.step

    def fails(shard, gradients, present, hyperparameters):
        if hyperparameters[0] == 0.125:
            raise ZeroDivisionError("float division by zero")
        real(shard, gradients, present, hyperparameters)

    monkeypatch.setattr(Shard, "step", fails)
    peer = hostile.Joined(serving.addresses[0], SECRET, description(mode="async"))
    peer.metadata[3] = 0.125
    peer.metadata[-4:] = 1
    peer.push()
    assert peer.hear()[0] == Reply.REFUSED
    training.step(1)
    serving.stop()
    again = Server(secret=SECRET, directory=tmp_path / "server")
    assert again.status().versions == (2,)
    assert torch.equal(
        again._training.state.shards[0].flats[0], torch.cat([p.detach().flatten() for p in training.parameters])
    )
    again.listener.close()
    training.client.abandon()


def test_no_more_connections_than_it_can_have(monkeypatch):
    """One more is sent away, also of those that have the secret, and a place is free again when one goes."""
    monkeypatch.setattr("lightkit.parameter_server.server._MAX_SESSIONS", 3)
    serving = Serving(1)
    honest = Training(serving.addresses, 0, workers=1, mode="async")
    who = description(workers=1, mode="async")
    peers = [hostile.Joined(serving.addresses[0], SECRET, {**who, "rank": rank}) for rank in (1, 2)]
    with pytest.raises(TransportError):
        hostile.Joined(serving.addresses[0], SECRET, {**who, "rank": 3})
    honest.step(0)
    peers[0].connection.close()
    until(lambda: serving.servers[0].status().sessions == 2)
    third = hostile.Joined(serving.addresses[0], SECRET, {**who, "rank": 3})
    for peer in (third, peers[1]):
        peer.connection.close()
    honest.end()


class Impostor:
    """A server that has the secret and does what it likes with whoever comes."""

    def __init__(self, act):
        self.listener = Listener("127.0.0.1", 0, SECRET, 2.0)
        self.listener.listen()
        self.address = f"127.0.0.1:{self.listener.port}"
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(act,), daemon=True)
        self.thread.start()

    def run(self, act):
        kept = []
        while not self.over.is_set():
            if (connection := self.listener.accept(0.05)) is not None:
                try:
                    connection.receive_message()
                    act(connection)
                except TransportError:
                    pass
                kept.append(connection)
        self.listener.close()
        for connection in kept:
            connection.close()

    def stop(self):
        self.over.set()
        self.thread.join(5)


def joined(connection, **fields):
    connection.send_header(Reply.OK)
    connection.send_message({"begun": True, "pushes": [0], "timeout": 1.0, **fields})


def answers(*send):
    def act(connection):
        joined(connection)
        connection.receive_header()
        for one in send:
            one(connection)

    return act


IMPOSTORS = {
    "closes": lambda connection: connection.close(),
    "says nothing": lambda connection: None,
    "unknown answer": lambda connection: connection.send_header(77),
    "refuses without a reason": lambda connection: (connection.send_header(Reply.REFUSED), connection.send_message(7)),
    "refuses with rubbish": lambda connection: (connection.send_header(Reply.REFUSED), connection.send_header(1)),
    "joined a list": lambda connection: (connection.send_header(Reply.OK), connection.send_message([1])),
    "joined timeout": lambda connection: joined(connection, timeout="x"),
    "joined timeout NaN": lambda connection: joined(connection, timeout=float("nan")),
    "large reply": answers(lambda c: c.send_header(Reply.OK, 1), lambda c: c.send(torch.zeros(5_000_000))),
    "small reply": answers(lambda c: c.send_header(Reply.OK, 1), lambda c: c.send(torch.zeros(3))),
    "no reply": answers(lambda c: c.send_header(Reply.OK, 1)),
    "norm of a pull": answers(lambda c: c.send_header(Reply.NORM)),
    "message": answers(lambda c: c.send_message({"x": 1})),
    "rubbish": answers(lambda c: c._socket.sendall(bytes(range(256)) * 10)),
}


@pytest.mark.parametrize("what", sorted(IMPOSTORS))
def test_a_server_that_does_not_do_what_it_should(what, monkeypatch):
    """A worker ends with one error, in the time that it has patience for."""
    monkeypatch.setattr("lightkit.parameter_server.server_session._MAX_ATTEMPTS", 3)
    impostor = Impostor(IMPOSTORS[what])
    clients = []

    def work():
        model = network()
        optimizer = sgd(model.parameters())
        client = Client([impostor.address], SECRET, 0, spec_of(model, optimizer), timeout=0.5, patience=1.0)
        clients.append(client)
        client.start([group_options(optimizer)], [[p.detach() for p in model.parameters()]])
        client.pull(0)

    try:
        with pytest.raises(LightkitError) as caught:
            together(work, timeout=15)
        assert "\n" not in str(caught.value)
    finally:
        clients[0].abandon()
        impostor.stop()


STATES = {
    "nothing": [],
    "a number": 5,
    "numbers": [1],
    "no flats": [{"state": [], "seeds": []}],
    "other flats": [{"flats": [torch.zeros(3)], "state": [{}] * 4, "seeds": [None]}],
    "flats of numbers": [{"flats": [1.0], "state": [{}] * 4, "seeds": [None]}],
    "states of numbers": [{"flats": [torch.zeros(75)], "state": [1] * 4, "seeds": [None]}],
    "seeds of text": [{"flats": [torch.zeros(75)], "state": [{}] * 4, "seeds": ["x"]}],
    "too much": [{"flats": [torch.zeros(1_000_000)], "state": [{}] * 4, "seeds": [None]}],
}


@pytest.mark.parametrize("what", sorted(STATES))
def test_a_state_that_is_none(what, monkeypatch):
    """What goes into a checkpoint is what the job has."""
    monkeypatch.setattr("lightkit.parameter_server.server_session._MAX_ATTEMPTS", 2)

    def act(connection):
        joined(connection)
        connection.receive_header()
        connection.send_header(Reply.OK)
        connection.send_message(STATES[what])

    impostor = Impostor(act)
    model = network()
    optimizer = sgd(model.parameters())
    client = Client([impostor.address], SECRET, 0, spec_of(model, optimizer), timeout=1.0, patience=1.0)
    try:
        with pytest.raises(LightkitError, match=r"broke 2 connections in a row"):
            client.state()
    finally:
        client.abandon()
        impostor.stop()


def test_an_old_connection_is_not_taken_for_the_new_one():
    """Signs of life on a connection that was given up keep nobody alive."""
    serving = Serving(1)
    honest = Training(serving.addresses, 0, workers=2, mode="async")
    who = description(workers=2, mode="async")
    first = hostile.Joined(serving.addresses[0], SECRET, who)
    second = hostile.Joined(serving.addresses[0], SECRET, who)
    with pytest.raises(TransportError):
        first.connection.receive_header()
    second.push()
    assert second.connection.receive_header()[0] == Reply.OK
    second.connection.close()
    with pytest.raises(ConfigError, match="refuses"):
        Training(serving.addresses, 0, workers=2, mode="async", patience=1.0)
    honest.end()
