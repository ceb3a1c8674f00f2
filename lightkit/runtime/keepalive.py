"""Connections by which each process of a job notices that another one is gone, even after a cut of the network.

In a collective a process waits for the others, for half an hour by default. The connections of a killed process close,
which the others notice. A machine that is cut off sends nothing at all, and torchrun restarts only the machines whose
processes end. So each process keeps an idle connection to the process of rank 0. The operating systems on both ends
probe the connection (TCP keepalive); they answer also while the process computes.
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

# Seconds of silence before the first probe, seconds between probes, and the number of unanswered probes after which the
# kernel closes a connection. Together 13 seconds: torchrun gives up a node a little later.
_IDLE, _INTERVAL, _PROBES = 5, 2, 4

# A process that ends as it should sends this byte.
_DONE = b"."

# Seconds in which the lost process, and then this one, may print their error messages before this one ends.
_GRACE = 1.0

# Seconds for the connection to the process of rank 0, which already listens.
_CONNECT = 30.0


class Keepalive:
    """The connections of this process to the others of its job; ends the process when another process is gone.

    Args:
        store: the store of torch.distributed that all processes of the job are connected to.
        rank: the rank of this process.
        host: the host name or address of the process of rank 0.

    Raises:
        OSError: the process of rank 0 cannot be reached.
    """

    def __init__(self, store: Any, rank: int, host: str) -> None:
        self._connections: list[socket.socket] = []
        if rank == 0:
            # The others connect to `host`: the server needs an address of the same family.
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
        """Tells the other processes that this process ends as it should, so that they do not end."""
        for connection in self._connections:
            try:
                connection.sendall(_DONE)
            except OSError:
                # The process at the other end has ended before this one.
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
                    if (rank := _read_rank(connection, token)) is None:
                        connection.close()
                        continue
                    _probe(connection)
                    self._connections.append(connection)
                    selector.register(connection, selectors.EVENT_READ, rank)
                elif isinstance(key.fileobj, socket.socket):
                    selector.unregister(key.fileobj)
                    if not _ended_well(key.fileobj):
                        _give_up(key.data)


def _read_rank(connection: socket.socket, token: str) -> int | None:
    """Returns the rank of the process at the other end of a new connection.

    Args:
        connection: the connection.
        token: the random text of this job, which the process must send with its rank within 5 seconds.

    Returns:
        The rank; None if the process does not send the token, so that it does not belong to this job.
    """
    connection.settimeout(5.0)
    try:
        with connection.makefile("r") as lines:
            said, _, rank = lines.readline(80).strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        return None
    connection.settimeout(None)
    return int(rank) if secrets.compare_digest(said, token) and rank.isdigit() else None


def _probe(connection: socket.socket) -> None:
    """Sets TCP keepalive on ``connection``: the system probes it while it is idle, and closes it without an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The options exist on Linux. Elsewhere a cut of the network is noticed after the system's own time.
    for name, value in (("TCP_KEEPIDLE", _IDLE), ("TCP_KEEPINTVL", _INTERVAL), ("TCP_KEEPCNT", _PROBES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _ended_well(connection: socket.socket) -> bool:
    """Waits for the end of ``connection``; returns True if the other process has called `Keepalive.release` before."""
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
    # os._exit instead of an orderly end: the main thread may wait in a collective for ever.
    os._exit(1)
