"""Servers with the secret that break the protocol: the worker ends with one error."""

from __future__ import annotations

import threading

import pytest
import torch
from workers import SECRET, network, sgd, spec_of, together

from lightkit.errors import LightkitError
from lightkit.parameter_server import Client, group_options
from lightkit.parameter_server.protocol import Reply
from lightkit.parameter_server.rendezvous import Listener
from lightkit.parameter_server.transport import TransportError


class Impostor:
    """A server with the secret that acts arbitrarily on each connection."""

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


def replies(*send):
    def act(connection):
        joined(connection)
        connection.receive_header()
        for one in send:
            one(connection)

    return act


IMPOSTORS = {
    "closes": lambda connection: connection.close(),
    "says nothing": lambda connection: None,
    "unknown reply": lambda connection: connection.send_header(77),
    "refuses without a reason": lambda connection: (connection.send_header(Reply.REFUSED), connection.send_message(7)),
    "refuses with rubbish": lambda connection: (connection.send_header(Reply.REFUSED), connection.send_header(1)),
    "joined a list": lambda connection: (connection.send_header(Reply.OK), connection.send_message([1])),
    "joined timeout": lambda connection: joined(connection, timeout="x"),
    "joined timeout NaN": lambda connection: joined(connection, timeout=float("nan")),
    "large reply": replies(lambda c: c.send_header(Reply.OK, 1), lambda c: c.send(torch.zeros(5_000_000))),
    "small reply": replies(lambda c: c.send_header(Reply.OK, 1), lambda c: c.send(torch.zeros(3))),
    "no reply": replies(lambda c: c.send_header(Reply.OK, 1)),
    "norm of a pull": replies(lambda c: c.send_header(Reply.NORM)),
    "message": replies(lambda c: c.send_message({"x": 1})),
    "rubbish": replies(lambda c: c._socket.sendall(bytes(range(256)) * 10)),
}


@pytest.mark.parametrize("what", sorted(IMPOSTORS))
def test_a_hostile_server(what, monkeypatch):
    """The worker ends with one error, within its patience."""
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
def test_an_invalid_state(what, monkeypatch):
    """The client rejects a state of other parameters, which would go into a checkpoint."""
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
