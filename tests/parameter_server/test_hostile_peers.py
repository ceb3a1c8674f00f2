"""Workers with the secret that break the protocol: each loses its own connection, and the others train on."""

from __future__ import annotations

import random
import secrets
import threading
import time

import hostile
import pytest
import torch
from support.processes import wait_for
from workers import (
    SECRET,
    ServerProcess,
    Serving,
    Training,
    network,
    reference,
    sgd,
    spec_of,
    together,
)

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server import group_options
from lightkit.parameter_server.protocol import Reply, Request
from lightkit.parameter_server.transport import TransportError


def description(rank=1, **settings):
    """Returns the join request of a worker of the tests."""
    model = network()
    spec = spec_of(model, sgd(model.parameters()), **settings)
    return {"rank": rank, "incarnation": secrets.token_hex(8), "timeout": 5.0, "job": spec.to_json()}


@pytest.mark.parametrize("numbers", [5_000_000, 10])
def test_a_push_of_another_size(numbers):
    """The server refuses a push of 5,000,000 or 10 numbers in place of 75, and continues with the other worker."""
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
def test_a_hostile_worker_changes_nothing(what, seed):
    """Another worker trains meanwhile, and reaches the weights of a training without the hostile one."""
    serving = Serving(1, timeout=2.0)
    (server,) = serving.servers
    settings = {"workers": 1, "mode": "async", "timeout": 2.0}
    honest = Training(serving.addresses, 0, **settings)
    honest.step(0)
    peer = hostile.JoinedWorker(serving.addresses[0], SECRET, description(workers=1, mode="async"))
    hostile.WORKERS[what](peer, random.Random(seed))
    for step in range(1, 12):
        honest.step(step)
    # The hostile worker sends no heartbeats: the server drops it at the latest after the timeout.
    wait_for(lambda: server.status().connected == {0})
    peer.connection.close()
    wait_for(lambda: server.status().sessions == 1)
    weights, _ = honest.end()
    assert torch.equal(weights, reference()[0])
    serving.threads[0].join(10)
    assert not serving.threads[0].is_alive() and server.status().versions == (12,)


@pytest.mark.parametrize("what", ["large_push", "unknown_request", "unknown_optimizer", "begins_again", "huge_tensor"])
def test_a_refused_worker_gets_the_reason(what):
    """A refused worker that reads the connection receives the reason."""
    serving = Serving(1)
    honest = Training(serving.addresses, 0, mode="async")
    peer = hostile.JoinedWorker(serving.addresses[0], SECRET, description(mode="async"))
    if what == "large_push":
        # The push is so small that it fits into the buffers of the system.
        peer.push(count=peer.count + 1)
    else:
        hostile.WORKERS[what](peer, random.Random(0))
    reply = peer.receive_reply()
    assert reply is None or reply[0] == Reply.REFUSED
    honest.end()


def test_invalid_join_requests():
    """The server refuses each within seconds, remembers none, and accepts the next worker."""
    serving = Serving(1)
    (server,) = serving.servers
    honest = Training(serving.addresses, 0, workers=2, mode="async")
    for name, who in hostile.join_requests(description(workers=2, mode="async")).items():
        started = time.monotonic()
        with pytest.raises((TransportError, KeyError, AssertionError)):
            connection = hostile.connect(serving.addresses[0], SECRET, who, 5.0, 5.0)
            assert connection.receive_header()[0] == Reply.OK, name
        assert time.monotonic() - started < 5, name
    wait_for(lambda: server.status().connected == {0})
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
def test_a_training_that_cannot_begin(change, tmp_path):
    """The server refuses an invalid begin message, and begins with the next worker."""
    serving = Serving(1, directory=tmp_path / "server")
    good = description(rank=0)
    peer = hostile.JoinedWorker(serving.addresses[0], SECRET, good)
    model = network()
    start = {
        "job": good["job"],
        "options": [group_options(sgd(model.parameters()))],
        "values": [[p.detach() for p in model.parameters()]],
        "state": [[]],
    }
    peer.connection.send_header(Request.BEGIN)
    peer.connection.send_message({**start, **change})
    reply = peer.receive_reply()
    assert reply is None or reply[0] == Reply.REFUSED
    wait_for(lambda: not serving.servers[0].status().connected)
    training = Training(serving.addresses, 0)
    assert training.begun
    training.step(0)
    training.end()


def test_repeated_and_arbitrary_sequence_numbers():
    """A repeated push counts once; the sequence numbers of one worker do not affect another."""
    serving = Serving(1)
    (server,) = serving.servers
    honest = Training(serving.addresses, 0, workers=1, mode="bounded", staleness=2)
    peer = hostile.JoinedWorker(serving.addresses[0], SECRET, description(workers=1, mode="bounded", staleness=2))
    for push_seq in (1, 1, 0, -(2**63), 1):
        peer.push(push_seq)
        peer.connection.receive_header()
        peer.connection.receive(torch.zeros(peer.count))
    assert server.status().versions == (1,)
    peer.push(2**63 - 1)
    wait_for(lambda: server.status().versions == (2,))
    together(lambda: [honest.step(step) for step in range(3)])
    honest.end()


def test_a_worker_that_leaves_early_does_not_end_the_training(tmp_path):
    """A worker that leaves before it has finished counts as lost; the server keeps its files."""
    serving = Serving(1, directory=tmp_path / "server", timeout=3.0)
    honest = Training(serving.addresses, 0, workers=1, mode="async")
    honest.step(0)
    peer = hostile.JoinedWorker(serving.addresses[0], SECRET, description(workers=1, mode="async"))
    peer.connection.send_header(Request.LEAVE)
    wait_for(lambda: serving.servers[0].status().connected == {0})
    # The network of the honest worker fails for a moment.
    honest.client._sessions[0]._connection.close()
    wait_for(lambda: not serving.servers[0].status().connected)
    time.sleep(0.5)
    assert serving.threads[0].is_alive() and list((tmp_path / "server").glob("snapshot-*"))
    honest.step(1)
    honest.end()


def test_a_push_after_finish():
    """The server refuses it: the other workers have made their steps without this worker."""
    serving = Serving(1)
    training = Training(serving.addresses, 0, mode="async")
    training.step(0)
    training.client.finish()
    with pytest.raises(LightkitError, match="pushes no more"):
        training.step(1)
    assert serving.servers[0].status().versions == (1,)
    training.client.abandon()


def test_a_slow_push_times_out(monkeypatch):
    """A byte now and then does not keep a worker alive: the others make the sync step without it."""
    monkeypatch.setattr("lightkit.parameter_server.transport._MIN_BYTES_PER_SECOND", 1 << 40)
    serving = Serving(1, timeout=1.0)
    honest = Training(serving.addresses, 0, workers=2, timeout=1.0)
    peer = hostile.JoinedWorker(serving.addresses[0], SECRET, description(workers=2))
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


def test_a_waiting_worker_gets_heartbeats_despite_frequent_changes():
    """The server sends a waiting worker heartbeats in time, although another worker pushes all the while."""
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
    """A push that the optimizer rejects must not fail again at each recovery."""
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
    peer = hostile.JoinedWorker(serving.addresses[0], SECRET, description(mode="async"))
    peer.metadata[3] = 0.125
    peer.metadata[-4:] = 1
    peer.push()
    assert peer.receive_reply()[0] == Reply.REFUSED
    training.step(1)
    serving.stop()
    again = Server(secret=SECRET, directory=tmp_path / "server")
    assert again.status().versions == (2,)
    assert torch.equal(
        again._training.state.shards[0].flats[0], torch.cat([p.detach().flatten() for p in training.parameters])
    )
    again.listener.close()
    training.client.abandon()


def test_the_number_of_sessions_is_limited(monkeypatch):
    """The server refuses one more worker, and accepts one after another worker has left."""
    monkeypatch.setattr("lightkit.parameter_server.server._MAX_SESSIONS", 3)
    serving = Serving(1)
    honest = Training(serving.addresses, 0, workers=1, mode="async")
    who = description(workers=1, mode="async")
    peers = [hostile.JoinedWorker(serving.addresses[0], SECRET, {**who, "rank": rank}) for rank in (1, 2)]
    with pytest.raises(TransportError):
        hostile.JoinedWorker(serving.addresses[0], SECRET, {**who, "rank": 3})
    honest.step(0)
    peers[0].connection.close()
    wait_for(lambda: serving.servers[0].status().sessions == 2)
    third = hostile.JoinedWorker(serving.addresses[0], SECRET, {**who, "rank": 3})
    for peer in (third, peers[1]):
        peer.connection.close()
    honest.end()


def test_heartbeats_of_an_old_connection_do_not_count():
    """A worker stays alive by its current connection alone."""
    serving = Serving(1)
    honest = Training(serving.addresses, 0, workers=2, mode="async")
    who = description(workers=2, mode="async")
    first = hostile.JoinedWorker(serving.addresses[0], SECRET, who)
    second = hostile.JoinedWorker(serving.addresses[0], SECRET, who)
    with pytest.raises(TransportError):
        first.connection.receive_header()
    second.push()
    assert second.connection.receive_header()[0] == Reply.OK
    second.connection.close()
    with pytest.raises(ConfigError, match="refuses"):
        Training(serving.addresses, 0, workers=2, mode="async", patience=1.0)
    honest.end()
