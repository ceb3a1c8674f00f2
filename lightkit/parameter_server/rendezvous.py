"""How a worker and a server meet: on one TCP connection, on which each shows the other that it knows the secret.

The server speaks first and sends a greeting with its version and a nonce; the worker answers with a nonce of its own
and a proof; the server answers with its proof. A proof is an HMAC of greeting and nonce under the secret. All three
have fixed sizes, and nothing else is read from a peer before its proof.

Who records a handshake can try secrets against it: a secret should be one that nobody guesses, as
``python -c "import secrets; print(secrets.token_hex(16))"`` prints it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import selectors
import socket
import struct
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import lightkit
from lightkit.errors import ConfigError
from lightkit.parameter_server.transport import Connection, TransportError

_log = logging.getLogger(__name__)

# In the environment of workers and servers, where nobody else gives it to them.
SECRET = "LIGHTKIT_SECRET"

# Seconds in which two processes that have connected show each other that they know the secret.
HANDSHAKE = 10.0

# Connections that have not shown that they know the secret. When one more comes, the oldest of the address that has
# most of them goes: a worker needs a round trip to the server, so that it is through before many others have come.
MOST_REQUESTS = 128

_MAGIC = b"lightkit/ps2"
_GREETING = struct.Struct("<12s32s32s")  # magic, version, nonce
_HELLO = struct.Struct("<32s32s")  # nonce, proof
_ANSWER = struct.Struct("<B32s")  # verdict, proof
_ACCEPTED, _OTHER_SECRET = range(2)


@dataclass(frozen=True)
class Handshake:
    """What has been said when a worker and a server prove that they know the secret.

    Args:
        secret: the one that the process at this side knows.
        greeting: the server's, whole.
        nonce: the worker's, 32 bytes.
    """

    secret: str
    greeting: bytes
    nonce: bytes

    def proof(self, side: str) -> bytes:
        """Returns the 32 bytes by which the ``worker`` or the ``server`` shows that it knows the secret."""
        return self._derive(f"{side} knows")

    def keys(self, side: str) -> tuple[bytes, bytes]:
        """Returns the keys by which that side signs and checks what follows."""
        keys = {sender: self._derive(f"{sender} signs") for sender in ("worker", "server")}
        return keys[side], keys["server" if side == "worker" else "worker"]

    def _derive(self, what: str) -> bytes:
        return hmac.digest(self.secret.encode(), what.encode() + b"\0" + self.greeting + self.nonce, "sha256")


class ConnectRequest:
    """A peer that has connected and not shown yet that it knows the secret."""

    def __init__(self, connected: socket.socket, host: str) -> None:
        self.socket, self.host = connected, host
        self.until = time.monotonic() + HANDSHAKE
        self.greeting = _GREETING.pack(_MAGIC, _version(), secrets.token_bytes(32))
        self.heard = b""
        connected.setblocking(False)
        # It fits into the empty buffer of a connection that has just come.
        connected.sendall(self.greeting)

    def read(self) -> bool:
        """Takes what has come; returns whether that is the whole hello.

        Raises:
            OSError: the peer is gone.
        """
        part = self.socket.recv(_HELLO.size - len(self.heard))
        if not part:
            raise ConnectionError("it closed the connection")
        self.heard += part
        return len(self.heard) == _HELLO.size

    def answer(self, secret: str) -> Handshake | None:
        """Answers the hello; returns the handshake, or None if the peer does not know the secret.

        Raises:
            OSError: the peer is gone.
        """
        nonce, proof = _HELLO.unpack(self.heard)
        handshake = Handshake(secret, self.greeting, nonce)
        if not hmac.compare_digest(proof, handshake.proof("worker")):
            self.socket.sendall(_ANSWER.pack(_OTHER_SECRET, b""))
            return None
        self.socket.sendall(_ANSWER.pack(_ACCEPTED, handshake.proof("server")))
        return handshake


class Listener:
    """The address at which workers find a server.

    It has no thread and no connection beyond `MOST_REQUESTS` of its own, whoever comes: `accept` does the work.

    Args:
        host: of this machine, to be reached by the workers; ``127.0.0.1`` for those on this machine alone.
        port: 0 for any free one.
        secret: that workers must know.
        silence: see `lightkit.parameter_server.transport.Connection`.

    Raises:
        ConfigError: the address is not one of this machine, or the port is in use.
    """

    def __init__(self, host: str, port: int, secret: str, silence: float) -> None:
        self._secret, self._silence = secret, silence
        self._requests: dict[socket.socket, ConnectRequest] = {}
        self._accepted: deque[Connection] = deque()
        self._selector = selectors.DefaultSelector()
        self._unsaid, self._said_at = 0, -1.0
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.host, self.port = host, port
        try:
            self._socket.bind((host, port))
            self.port = self._socket.getsockname()[1]
        except (OSError, OverflowError) as error:
            self._give_up(error)

    def listen(self) -> None:
        """Takes connections from here on; until then they are refused.

        Raises:
            ConfigError: another process has come before.
        """
        try:
            self._socket.listen(4096)
        except OSError as error:
            self._give_up(error)
        self._selector.register(self._socket, selectors.EVENT_READ)

    def accept(self, seconds: float) -> Connection | None:
        """Returns the next peer that has shown that it knows the secret, or None if there is none for so long."""
        end = time.monotonic() + seconds
        while not self._accepted:
            now = time.monotonic()
            if now >= end:
                return None
            for key, _ in self._selector.select(end - now):
                if key.fileobj is self._socket:
                    self._admit()
                elif key.fileobj in self._requests:
                    self._go_on_with(self._requests[key.fileobj])
            self._drop_the_late()
        return self._accepted.popleft()

    def close(self) -> None:
        """Stops listening, and drops who has not been accepted."""
        for request in list(self._requests.values()):
            self._drop(request)
        self._selector.close()
        self._socket.close()

    def _admit(self) -> None:
        try:
            connected, address = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # It has gone again, or there is no descriptor left: let go of those that have waited longest.
            self._note(f"a connection could not be accepted: {error.strerror}")
            self._drop_one()
            time.sleep(0.01)
            return
        if len(self._requests) >= MOST_REQUESTS:
            self._drop_one()
        try:
            request = ConnectRequest(connected, address[0])
        except OSError:
            connected.close()
            return
        self._requests[connected] = request
        self._selector.register(connected, selectors.EVENT_READ)

    def _go_on_with(self, request: ConnectRequest) -> None:
        try:
            if not request.read():
                return
            handshake = request.answer(self._secret)
        except OSError:
            self._drop(request)
            return
        if handshake is None:
            self._note("a worker came with another secret")
            self._drop(request)
            return
        self._forget(request)
        self._accepted.append(Connection(request.socket, handshake.keys("server"), self._silence))

    def _drop_the_late(self) -> None:
        # They are in the order in which they came.
        now = time.monotonic()
        while self._requests and (oldest := next(iter(self._requests.values()))).until < now:
            self._note(f"a connection did not show in {HANDSHAKE:g} s that it knows the secret")
            self._drop(oldest)

    def _drop_one(self) -> None:
        counts = Counter(request.host for request in self._requests.values())
        if counts:
            ((host, _),) = counts.most_common(1)
            self._drop(next(request for request in self._requests.values() if request.host == host))

    def _drop(self, request: ConnectRequest) -> None:
        self._forget(request)
        request.socket.close()

    def _forget(self, request: ConnectRequest) -> None:
        self._selector.unregister(request.socket)
        del self._requests[request.socket]

    def _note(self, message: str) -> None:
        """Logs, once a second: whoever comes must not be able to fill the disk by it."""
        self._unsaid += 1
        if (now := time.monotonic()) - self._said_at >= 1.0:
            others = f" (and {self._unsaid - 1} others were dropped)" if self._unsaid > 1 else ""
            _log.warning("%s%s", message, others)
            self._unsaid, self._said_at = 0, now

    def _give_up(self, error: Exception) -> None:
        self._socket.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"a parameter server cannot listen on {self.host}:{self.port}: {reason}") from None


def connect(address: str, secret: str, who: dict[str, Any], patience: float, silence: float) -> Connection:
    """Connects with a server.

    Args:
        address: ``HOST:PORT``.
        secret: the server's.
        who: what it is told of this worker.
        patience: seconds in which it must have come up.
        silence: seconds without an answer after which it counts as gone.

    Raises:
        TransportError: it cannot be reached, or does not answer as a parameter server.
        ConfigError: another secret or version, an address that is none.
    """
    host, port = split_address(address)
    connected = _reach(host, port, time.monotonic() + patience, address)
    try:
        connection = Connection(connected, _shake_hands(connected, address, secret).keys("worker"), silence)
    except BaseException:
        connected.close()
        raise
    connection.send_message(who)
    return connection


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port.

    Raises:
        ConfigError: it is not ``HOST:PORT``.
    """
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"the address of a parameter server must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def _shake_hands(connected: socket.socket, address: str, secret: str) -> Handshake:
    end = time.monotonic() + HANDSHAKE
    try:
        greeting = _read(connected, _GREETING.size, end)
        magic, version, _ = _GREETING.unpack(greeting)
        if magic != _MAGIC:
            raise ConnectionError(f"it said {greeting[:16]!r}")
        if version != _version():
            raise ConfigError(
                f"the parameter server at {address} refuses this worker: the worker has lightkit "
                f"{lightkit.__version__}, the server {_text(version)}"
            )
        handshake = Handshake(secret, greeting, secrets.token_bytes(32))
        connected.sendall(_HELLO.pack(handshake.nonce, handshake.proof("worker")))
        verdict, proof = _ANSWER.unpack(_read(connected, _ANSWER.size, end))
    except OSError as error:
        raise TransportError(
            f"the parameter server at {address} does not answer as one: {error.strerror or error}; is that another "
            "program?"
        ) from None
    if verdict == _OTHER_SECRET:
        raise ConfigError(
            f"the parameter server at {address} refuses this worker: the secret is not that of the server ({SECRET})"
        )
    if verdict != _ACCEPTED or not hmac.compare_digest(proof, handshake.proof("server")):
        raise ConfigError(f"whoever listens at {address} does not know the secret ({SECRET})")
    return handshake


def _read(connected: socket.socket, count: int, end: float) -> bytes:
    """Returns so many bytes; an OSError where they do not come in time."""
    data = b""
    while len(data) < count:
        connected.settimeout(max(end - time.monotonic(), 0.001))
        try:
            part = connected.recv(count - len(data))
        except TimeoutError:
            raise TimeoutError(f"nothing came for {HANDSHAKE:g} s") from None
        if not part:
            raise ConnectionError("it closed the connection")
        data += part
    return data


def _reach(host: str, port: int, end: float, address: str) -> socket.socket:
    while True:
        try:
            connected = socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.1))
            if connected.getsockname() != connected.getpeername():
                return connected
            # Where nobody listens, a connection within a machine may meet itself.
            connected.close()
            reason = "Connection refused"
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if isinstance(error, socket.gaierror):
                # A name that does not resolve will not do so in a minute.
                end = 0.0
        if time.monotonic() >= end:
            raise TransportError(f"the parameter server at {address} cannot be reached: {reason}") from None
        time.sleep(0.1)


def _version() -> bytes:
    return lightkit.__version__.encode()[:32].ljust(32, b"\0")


def _text(version: bytes) -> str:
    """Returns a version to be shown, of whoever has sent it: nothing in it controls a terminal."""
    return "".join(c for c in version.rstrip(b"\0").decode("ascii", "replace") if c.isprintable())
