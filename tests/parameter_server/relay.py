"""A TCP relay between a worker and a server, which breaks connections as a network does."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Relays connections to a server.

    Args:
        address: ``HOST:PORT`` of the server.

    Attributes:
        address: ``HOST:PORT`` of the relay, for the worker.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_down = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, server_side: bool = True) -> None:
        """Breaks all connections; without ``server_side`` the server does not notice, and the worker does."""
        for worker, server in self._pairs:
            for connected in (worker, server) if server_side else (worker,):
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def go_down(self) -> None:
        """Breaks all connections, and refuses new ones until `come_up`."""
        self._is_down = True
        self.cut()

    def come_up(self) -> None:
        """Relays new connections again."""
        self._is_down = False

    def close(self) -> None:
        """Stops listening, and breaks all connections."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                worker, _ = self._listener.accept()
                if self._is_down:
                    worker.close()
                    continue
                server = socket.create_connection(self._server)
                self._pairs.append((worker, server))
                for source, target in ((worker, server), (server, worker)):
                    threading.Thread(target=self._copy, args=(source, target, server), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                target.sendall(part)
        if any(server in pair for pair in self._pairs):
            # One side has closed the connection by itself.
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)
