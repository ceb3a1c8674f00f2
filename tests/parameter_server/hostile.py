"""Hostile peers of a server: strangers without the secret, and workers with the secret that break the protocol."""

from __future__ import annotations

import contextlib
import random
import socket
import struct

import torch

from lightkit.parameter_server import rendezvous
from lightkit.parameter_server.protocol import PUSH_FLAGS, Request
from lightkit.parameter_server.rendezvous import connect
from lightkit.parameter_server.transport import FrameKind, TransportError

# The first bytes of other programs.
GREETINGS = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "store": b"\x00" + struct.pack("<I", 0x3C85F7CE) + b"\x0b" + struct.pack("<Q", 14) + b"lightkit/port/",
    "zeros": b"\0" * 100_000,
    "pickle": b"\x80\x04c__builtin__\nexit\n(tR.",
}


def stranger(address: str) -> socket.socket:
    """Returns a plain connection to a server."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def challenge_of(connected: socket.socket) -> bytes:
    """Returns the challenge of the server."""
    return connected.recv(rendezvous._CHALLENGE.size, socket.MSG_WAITALL)


def says(text: bytes):
    """Returns a stranger that sends bytes and waits for the server to end the connection."""

    def act(address: str, rng: random.Random) -> None:
        with stranger(address) as connected:
            with contextlib.suppress(OSError):
                connected.sendall(text)
            _until_closed(connected)

    return act


def goes_away(address: str, rng: random.Random) -> None:
    with stranger(address):
        pass


def resets(address: str, rng: random.Random) -> None:
    connected = stranger(address)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


def half_a_response(address: str, rng: random.Random) -> None:
    with stranger(address) as connected:
        challenge_of(connected)
        connected.sendall(rng.randbytes(rng.randrange(rendezvous._RESPONSE.size)))


def guesses(address: str, rng: random.Random) -> None:
    with stranger(address) as connected:
        challenge_of(connected)
        connected.sendall(rng.randbytes(rendezvous._RESPONSE.size))
        verdict, proof = rendezvous._VERDICT.unpack(connected.recv(rendezvous._VERDICT.size, socket.MSG_WAITALL))
        assert verdict == rendezvous._WRONG_SECRET and proof == bytes(32)
        _until_closed(connected)


def does_not_wait(address: str, rng: random.Random) -> None:
    """Sends a response without a proof, and frames at once."""
    with stranger(address) as connected, contextlib.suppress(OSError):
        connected.sendall(rng.randbytes(rendezvous._RESPONSE.size) + rng.randbytes(rng.randrange(5000)))
        _until_closed(connected)


STRANGERS = {f"says {name}": says(text) for name, text in GREETINGS.items()}
STRANGERS |= {f.__name__: f for f in (goes_away, resets, half_a_response, guesses, does_not_wait)}


# Seconds for which a stranger waits for the server to end the connection.
PATIENCE = 15.0


def _until_closed(connected: socket.socket) -> None:
    connected.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionError):
        while connected.recv(4096):
            pass


class JoinedWorker:
    """A worker that has joined, and sends arbitrary frames from then on."""

    def __init__(self, address, secret, who, timeout=5.0):
        self.connection = connect(address, secret, who, 5.0, timeout)
        self.connection.receive_header()
        self.joined = self.connection.receive_message(1 << 20)
        (optimizer,) = who["job"]["tables"]
        self.count = sum(torch.Size(p["shape"]).numel() for p in optimizer["parameters"])
        hyperparameters = sum(map(len, optimizer["numbers"]))
        self.metadata = torch.zeros(PUSH_FLAGS + hyperparameters + len(optimizer["parameters"]), dtype=torch.float64)

    def push(self, push_seq=1, version=0, optimizer_index=0, count=None):
        self.connection.send_header(Request.PUSH, optimizer_index, push_seq, version)
        self.connection.send(self.metadata, torch.zeros(self.count if count is None else count))

    def frame(self, kind, length, content=b"", signed=True):
        """Sends a frame whose header may announce another length than that of its content."""
        connection = self.connection
        signature = bytes(16)
        if signed:
            signature = connection._sign(connection._sending_key, connection._sent, kind, length, content)
        connection._sent += 1
        connection._socket.sendall(struct.pack("<BQ16s", kind, length, signature) + content)

    def receive_reply(self):
        """Returns the next reply of the server, or None if the server has ended the connection."""
        try:
            reply = self.connection.receive_header()
            return [*reply, self.connection.receive_message()["error"]] if reply[0] == 4 else reply
        except TransportError:
            return None


def large_push(peer, rng):
    peer.push(count=5_000_000)


def small_push(peer, rng):
    peer.push(count=rng.randrange(1, peer.count))


def large_metadata(peer, rng):
    peer.metadata = torch.zeros(1_000_000, dtype=torch.float64)
    peer.push()


def push_of_another_kind(peer, rng):
    peer.connection.send_header(Request.PUSH, 0, 1, 0)
    peer.connection.send_message({"gradients": torch.zeros(peer.count)})


def half_a_push(peer, rng):
    peer.connection.send_header(Request.PUSH, 0, 1, 0)
    peer.connection.send(peer.metadata)
    peer.frame(FrameKind.TENSOR, 4 * peer.count, bytes(rng.randrange(4 * peer.count)))


def huge_frame(peer, rng):
    peer.frame(
        rng.choice([FrameKind.HEADER, FrameKind.MESSAGE, FrameKind.TENSOR]), rng.choice([1 << 30, 1 << 62, 2**64 - 1])
    )


def huge_tensor(peer, rng):
    peer.connection.send_header(Request.PUSH, 0, 1, 0)
    peer.frame(FrameKind.TENSOR, 1 << 40)


def empty_frames(peer, rng):
    peer.frame(rng.choice([FrameKind.HEADER, FrameKind.MESSAGE, FrameKind.TENSOR]), 0)


def heartbeat_with_content(peer, rng):
    peer.frame(FrameKind.HEARTBEAT, 100, bytes(100))


def unknown_frame(peer, rng):
    peer.frame(rng.randrange(4, 256), rng.randrange(100))


def unsigned_frame(peer, rng):
    peer.frame(rng.choice([FrameKind.HEARTBEAT, FrameKind.HEADER, FrameKind.TENSOR]), 32, bytes(32), signed=False)


def repeated_frame(peer, rng):
    connection = peer.connection
    connection.send_heartbeat()
    connection._sent -= 1
    connection.send_heartbeat()


def rubbish(peer, rng):
    peer.connection._socket.sendall(rng.randbytes(rng.randrange(1, 10_000)))


def unknown_request(peer, rng):
    peer.connection.send_header(rng.choice([0, 7, 99, -1, -(2**63), 2**63 - 1]))


def unknown_optimizer(peer, rng):
    peer.connection.send_header(rng.choice([Request.PUSH, Request.PULL]), rng.choice([-1, 1, 10**6, -(2**63)]), 1, 0)


def begins_again(peer, rng):
    peer.connection.send_header(Request.BEGIN)
    peer.connection.send_message({"job": {}, "options": [], "values": [], "state": []})


def begins_with_too_much(peer, rng):
    peer.connection.send_header(Request.BEGIN)
    text = b'[{"__tensor__": 0}, [["float32", [1000000, 1000000]]]]'
    peer.frame(FrameKind.MESSAGE, len(text), text)


def message_that_is_none(peer, rng):
    peer.connection.send_header(Request.BEGIN)
    text = rng.choice(
        [
            b"[" * 100_000,
            b"\xff\xfe",
            b"[1, 2, 3]",
            b'[{"__tensor__": -1}, [["float32", [1]]]]',
            b'[{"__tensor__": 7}, []]',
            b'[{}, [["Tensor", [1]]]]',
            b'[{}, [["float32", [-1]]]]',
            b'[{}, [["float32", [1.5]]]]',
            b'[{}, [["float32", "x"]]]',
            b'[{}, [["float32", [281474976710655, 281474976710655]]]]',
            b"1" * 5000,
        ]
    )
    peer.frame(FrameKind.MESSAGE, len(text), text)


def request_before_the_reply(peer, rng):
    peer.connection.send_header(Request.FINISH)
    peer.connection.send_header(Request.PULL)


def leaves_at_once(peer, rng):
    peer.connection.send_header(Request.LEAVE)


def pulls_and_does_not_read(peer, rng):
    with contextlib.suppress(TransportError):
        for _ in range(200):
            peer.connection.send_header(Request.PULL)


def goes(peer, rng):
    peer.connection.close()


WORKERS = {
    f.__name__: f
    for f in (
        large_push,
        small_push,
        large_metadata,
        push_of_another_kind,
        half_a_push,
        huge_frame,
        huge_tensor,
        empty_frames,
        heartbeat_with_content,
        unknown_frame,
        unsigned_frame,
        repeated_frame,
        rubbish,
        unknown_request,
        unknown_optimizer,
        begins_again,
        begins_with_too_much,
        message_that_is_none,
        request_before_the_reply,
        leaves_at_once,
        pulls_and_does_not_read,
        goes,
    )
}


def join_requests(who):
    """Returns invalid join requests, by the fault of each."""
    job = who["job"]
    (table,) = job["tables"]
    parameter = table["parameters"][0]

    def with_parameter(**changes):
        changed = {**table, "parameters": [{**parameter, **changes}, *table["parameters"][1:]]}
        return {**who, "job": {**job, "tables": [changed]}}

    return {
        "no rank": {**who, "rank": None},
        "rank of text": {**who, "rank": "1"},
        "rank True": {**who, "rank": True},
        "negative rank": {**who, "rank": -1},
        "huge rank": {**who, "rank": 10**30},
        "long incarnation": {**who, "incarnation": "x" * 10_000_000},
        "incarnation of numbers": {**who, "incarnation": [1, 2]},
        "timeout 0": {**who, "timeout": 0},
        "timeout NaN": {**who, "timeout": float("nan")},
        "timeout infinite": {**who, "timeout": float("inf")},
        "timeout of text": {**who, "timeout": "30"},
        "nothing": {},
        "a list": [1, 2, 3],
        "a number": 7,
        "more": {**who, "more": 1},
        "a tensor": {**who, "job": torch.zeros(1000)},
        "no job": {**who, "job": None},
        "job of text": {**who, "job": "x" * 100_000},
        "many workers": {**who, "job": {**job, "workers": 10**12}},
        "long mode": {**who, "job": {**job, "mode": "x" * 1_000_000}},
        "mode of lists": {**who, "job": {**job, "mode": [[]]}},
        "fraction NaN": {**who, "job": {**job, "fraction": float("nan")}},
        "tables of numbers": {**who, "job": {**job, "tables": [1]}},
        "tables a number": {**who, "job": {**job, "tables": 1}},
        "negative shape": with_parameter(shape=[-5, 2]),
        "huge shape": with_parameter(shape=[10**30]),
        "shape of text": with_parameter(shape="12"),
        "no dtype": with_parameter(dtype="Tensor"),
        "dtype of lists": with_parameter(dtype=[]),
        "negative group": with_parameter(group=-1),
        "name a list": with_parameter(name=[]),
        "another model": with_parameter(shape=[10**9, 10**5]),
    }
