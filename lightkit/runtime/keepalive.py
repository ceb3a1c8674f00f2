"""Connections by which the processes of a job notice that one of them is gone, also behind a network that was cut.

In a collective a process waits for the others, for half an hour by default. A process that was killed closes its
connections, which the others notice; from a machine that is cut off nothing comes at all, and torchrun restarts those
only whose process ends. So each process keeps a connection to that of rank 0 that carries nothing, and which the
kernels on both ends probe: they answer also while a process computes.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

# Seconds of silence before the first probe, between probes, and how many go unanswered before a connection is given up.
# Together 13 seconds: a little less than torchrun takes to give up a node.
_IDLE, _INTERVAL, _PROBES = 5, 2, 4

# What a process sends when it has ended as it should.
_DONE = b"."

# Seconds in which a process that is gone, or this one for its sake, may say what went wrong.
_GRACE = 1.0

# Seconds for a connection to the process of rank 0, which has said that it waits for it.
_CONNECT = 30.0


class Keepalive:
    """The connections of one process; ends the process when another one is gone.

    Args:
        store: where all processes of the job meet.
        rank: of this process.
        host: the address of the process of rank 0.

    Raises:
        OSError: the process of rank 0 cannot be reached.
    """

    def __init__(self, store: Any, rank: int, host: str) -> None:
        self._connections: list[socket.socket] = []
        if rank == 0:
            # Of the family of addresses that the others know it by.
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            server = socket.create_server(("", 0), family=family)
            token = secrets.token_hex(16)
            store.set("keepalive", json.dumps([server.getsockname()[1], token]))
            target, arguments = self._watch_all, (server, token)
        else:
            port, token = json.loads(store.get("keepalive"))
            connection = socket.create_connection((host, port), timeout=_CONNECT)
            connection.settimeout(None)
            _probe(connection)
            connection.sendall(f"{token} {rank}\n".encode())
            self._connections.append(connection)
            target, arguments = self._watch_first, (connection,)
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def release(self) -> None:
        """Tells the others that this process ends as it should."""
        for connection in self._connections:
            try:
                connection.sendall(_DONE)
            except OSError:
                # It has ended before this one.
                continue

    def _watch_first(self, connection: socket.socket) -> None:
        if not _ended_well(connection):
            _give_up(0)

    def _watch_all(self, server: socket.socket, token: str) -> None:
        selector = selectors.DefaultSelector()
        selector.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    connection, _ = server.accept()
                    if (rank := _greeted(connection, token)) is None:
                        connection.close()
                        continue
                    _probe(connection)
                    self._connections.append(connection)
                    selector.register(connection, selectors.EVENT_READ, rank)
                else:
                    selector.unregister(key.fileobj)
                    if not _ended_well(key.fileobj):
                        _give_up(key.data)


def _greeted(connection: socket.socket, token: str) -> int | None:
    """The rank of a process of this job that has connected; None for anything else that found the port."""
    connection.settimeout(5.0)
    try:
        with connection.makefile("r") as lines:
            said, _, rank = lines.readline(80).strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        return None
    connection.settimeout(None)
    return int(rank) if secrets.compare_digest(said, token) and rank.isdigit() else None


def _probe(connection: socket.socket) -> None:
    """Has the kernel find out whether the other end can still be reached."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Linux's names; elsewhere the connection notices what is closed, and a network that was cut as late as is usual.
    for name, value in (("TCP_KEEPIDLE", _IDLE), ("TCP_KEEPINTVL", _INTERVAL), ("TCP_KEEPCNT", _PROBES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _ended_well(connection: socket.socket) -> bool:
    """Waits for the end of a connection; whether the other process announced it."""
    try:
        return connection.recv(1) == _DONE
    except OSError:
        return False


def _give_up(rank: int) -> None:
    time.sleep(_GRACE)
    print(
        f"process {os.environ['RANK']}: process {rank} has ended or cannot be reached any more, so this one ends too",
        file=sys.stderr,
        flush=True,
    )
    # At once: the main thread may be in a collective that nothing wakes it from.
    os._exit(1)
