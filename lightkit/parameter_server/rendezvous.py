"""Rendezvous of workers and servers: a TCP connection and a handshake in which both prove that they know the secret.

The server sends a challenge with its version and a nonce. The worker sends a response: a nonce of its own and a proof.
The server sends a verdict with its own proof. A proof is an HMAC of challenge and nonce under the secret. The three
messages have fixed sizes, and a peer reads nothing else before the proof of the other.

An attacker who records a handshake can try secrets against it: choose a secret that nobody guesses, such as the output
of ``python -c "import secrets; print(secrets.token_hex(16))"``.
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
from typing import Any, Literal, NoReturn

import lightkit
from lightkit.errors import ConfigError
from lightkit.parameter_server.transport import Connection, TransportError

_log = logging.getLogger(__name__)

# The environment variable of workers and servers with the secret.
SECRET_VARIABLE = "LIGHTKIT_SECRET"

# Seconds from the connection to the end of the handshake.
HANDSHAKE_TIMEOUT = 10.0

# The most connections before the end of their handshake. One more drops the oldest connection of the address that has
# the most: a worker needs one round trip, so that its handshake ends before many others arrive.
MAX_CONNECT_REQUESTS = 128

_MAGIC = b"lightkit/ps2"
_CHALLENGE = struct.Struct("<12s32s32s")  # magic, version, nonce
_RESPONSE = struct.Struct("<32s32s")  # nonce, proof
_VERDICT = struct.Struct("<B32s")  # verdict, proof
_ACCEPTED, _WRONG_SECRET = range(2)

Side = Literal["worker", "server"]


@dataclass(frozen=True)
class Handshake:
    """The values from which both sides derive their proofs and keys.

    Args:
        secret: the secret of this side.
        challenge: the bytes of the server's challenge.
        nonce: the worker's nonce, 32 random bytes.
    """

    secret: str
    challenge: bytes
    nonce: bytes

    def proof(self, side: Side) -> bytes:
        """Returns the 32 bytes by which ``side`` proves that it knows the secret."""
        return self._derive(f"{side} knows")

    def keys(self, side: Side) -> tuple[bytes, bytes]:
        """Returns the key by which ``side`` signs what it sends, and the key by which it checks what it receives.

        Each key has 32 bytes.
        """
        worker, server = self._derive("worker signs"), self._derive("server signs")
        return (worker, server) if side == "worker" else (server, worker)

    def _derive(self, purpose: str) -> bytes:
        return hmac.digest(self.secret.encode(), purpose.encode() + b"\0" + self.challenge + self.nonce, "sha256")


class ConnectRequest:
    """A connection of a peer that has not proved yet that it knows the secret; the constructor sends the challenge.

    Args:
        connected: the socket of the connection.
        host: the address of the peer.

    Attributes:
        deadline: the `time.monotonic` at which the handshake must have ended.

    Raises:
        OSError: the peer is gone.
    """

    def __init__(self, connected: socket.socket, host: str) -> None:
        self.socket, self.host = connected, host
        self.deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        self._challenge = _CHALLENGE.pack(_MAGIC, _version(), secrets.token_bytes(32))
        self._response = b""
        connected.setblocking(False)
        # The challenge fits into the empty buffer of a new connection.
        connected.sendall(self._challenge)

    def read(self) -> bool:
        """Reads the bytes of the response that have arrived; returns True when the response is complete.

        Raises:
            OSError: the peer is gone.
        """
        part = self.socket.recv(_RESPONSE.size - len(self._response))
        if not part:
            raise ConnectionError("it closed the connection")
        self._response += part
        return len(self._response) == _RESPONSE.size

    def verify(self, secret: str) -> Handshake | None:
        """Checks the complete response, and sends the verdict.

        Args:
            secret: the secret of the server.

        Returns:
            The handshake; None if the peer does not know the secret.

        Raises:
            OSError: the peer is gone.
        """
        nonce, proof = _RESPONSE.unpack(self._response)
        handshake = Handshake(secret, self._challenge, nonce)
        if not hmac.compare_digest(proof, handshake.proof("worker")):
            self.socket.sendall(_VERDICT.pack(_WRONG_SECRET, b""))
            return None
        self.socket.sendall(_VERDICT.pack(_ACCEPTED, handshake.proof("server")))
        return handshake


class Listener:
    """The listening socket of a server, and the handshakes of its peers.

    A listener has no thread: the handshakes proceed within `accept`. At most `MAX_CONNECT_REQUESTS` connections are in
    a handshake, however many peers connect.

    Args:
        host: an address of this machine that the workers can reach; ``127.0.0.1`` for workers on this machine alone.
        port: the port; 0 for any free port.
        secret: the secret that workers must know.
        timeout: the timeout of a `Connection`, in seconds.

    Raises:
        ConfigError: the address is not one of this machine, or the port is in use.
    """

    def __init__(self, host: str, port: int, secret: str, timeout: float) -> None:
        self._secret, self._timeout = secret, timeout
        self._requests: dict[socket.socket, ConnectRequest] = {}
        self._accepted: deque[Connection] = deque()
        self._selector = selectors.DefaultSelector()
        self._unlogged, self._logged_at = 0, -1.0
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.host, self.port = host, port
        try:
            self._socket.bind((host, port))
            self.port = int(self._socket.getsockname()[1])
        except (OSError, OverflowError) as error:
            self._fail(error)

    def listen(self) -> None:
        """Begins to listen; before this call the operating system refuses connections.

        Raises:
            ConfigError: another process listens on the port.
        """
        try:
            self._socket.listen(4096)
        except OSError as error:
            self._fail(error)
        self._selector.register(self._socket, selectors.EVENT_READ)

    def accept(self, seconds: float) -> Connection | None:
        """Waits for a connection whose handshake has succeeded, for ``seconds`` at most.

        Returns:
            The connection; None if there is none after ``seconds``.
        """
        end = time.monotonic() + seconds
        while not self._accepted:
            now = time.monotonic()
            if now >= end:
                return None
            for key, _ in self._selector.select(end - now):
                if key.fileobj is self._socket:
                    self._admit()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._requests:
                    self._continue(self._requests[key.fileobj])
            self._drop_late_requests()
        return self._accepted.popleft()

    def close(self) -> None:
        """Stops listening, and closes the connections whose handshake has not ended."""
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
            # The peer is gone, or no descriptor is left: drop the oldest request.
            self._warn(f"a connection could not be accepted: {error.strerror}")
            self._drop_one()
            time.sleep(0.01)
            return
        if len(self._requests) >= MAX_CONNECT_REQUESTS:
            self._drop_one()
        try:
            request = ConnectRequest(connected, address[0])
        except OSError:
            connected.close()
            return
        self._requests[connected] = request
        self._selector.register(connected, selectors.EVENT_READ)

    def _continue(self, request: ConnectRequest) -> None:
        try:
            if not request.read():
                return
            handshake = request.verify(self._secret)
        except OSError:
            self._drop(request)
            return
        if handshake is None:
            self._warn("a worker came with another secret")
            self._drop(request)
            return
        self._forget(request)
        self._accepted.append(Connection(request.socket, handshake.keys("server"), self._timeout))

    def _drop_late_requests(self) -> None:
        # The dictionary has the requests in the order of their arrival.
        now = time.monotonic()
        while self._requests and (oldest := next(iter(self._requests.values()))).deadline < now:
            self._warn(f"a connection did not prove within {HANDSHAKE_TIMEOUT:g} s that it knows the secret")
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

    def _warn(self, message: str) -> None:
        """Logs ``message`` as a warning, at most one a second, so that unknown peers cannot fill the disk."""
        self._unlogged += 1
        if (now := time.monotonic()) - self._logged_at >= 1.0:
            others = f" ({self._unlogged - 1} similar warnings were left out)" if self._unlogged > 1 else ""
            _log.warning("%s%s", message, others)
            self._unlogged, self._logged_at = 0, now

    def _fail(self, error: Exception) -> NoReturn:
        self._socket.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"a parameter server cannot listen on {self.host}:{self.port}: {reason}") from None


def connect(address: str, secret: str, request: dict[str, Any], patience: float, timeout: float) -> Connection:
    """Returns a connection to a server, after the handshake and with the join request sent.

    Args:
        address: the address ``HOST:PORT`` of the server.
        secret: the secret of the server.
        request: the entries of a `lightkit.parameter_server.protocol.JoinRequest` as JSON values.
        patience: the seconds in which the server must have started.
        timeout: the seconds without a byte from the server after which the server counts as gone.

    Raises:
        TransportError: the server cannot be reached, or is no parameter server.
        ConfigError: the address is invalid, or the server has another secret or version.
    """
    host, port = split_address(address)
    connected = _reach(host, port, time.monotonic() + patience, address)
    try:
        connection = Connection(connected, _shake_hands(connected, address, secret).keys("worker"), timeout)
    except BaseException:
        connected.close()
        raise
    connection.send_message(request)
    return connection


def split_address(address: str) -> tuple[str, int]:
    """Returns the host and the port of ``address``, which has the form ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ConfigError: ``address`` has another form.
    """
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"the address of a parameter server must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def _shake_hands(connected: socket.socket, address: str, secret: str) -> Handshake:
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT
    try:
        challenge = _read(connected, _CHALLENGE.size, deadline)
        magic, version, _ = _CHALLENGE.unpack(challenge)
        if magic != _MAGIC:
            raise ConnectionError(f"it sent {challenge[:16]!r}")
        if version != _version():
            raise ConfigError(
                f"the parameter server at {address} refuses this worker: the worker has lightkit "
                f"{lightkit.__version__}, the server {_printable(version)}"
            )
        handshake = Handshake(secret, challenge, secrets.token_bytes(32))
        connected.sendall(_RESPONSE.pack(handshake.nonce, handshake.proof("worker")))
        verdict, proof = _VERDICT.unpack(_read(connected, _VERDICT.size, deadline))
    except OSError as error:
        raise TransportError(
            f"the parameter server at {address} does not answer as one: {error.strerror or error}; is that another "
            "program?"
        ) from None
    if verdict == _WRONG_SECRET:
        raise ConfigError(
            f"the parameter server at {address} refuses this worker: the secret is not that of the server "
            f"({SECRET_VARIABLE})"
        )
    if verdict != _ACCEPTED or not hmac.compare_digest(proof, handshake.proof("server")):
        raise ConfigError(f"the program that listens at {address} does not know the secret ({SECRET_VARIABLE})")
    return handshake


def _read(connected: socket.socket, count: int, deadline: float) -> bytes:
    """Returns the next ``count`` bytes of a connection.

    Args:
        connected: the socket of the connection.
        count: the number of bytes.
        deadline: the `time.monotonic` before which all bytes must arrive.

    Raises:
        OSError: the bytes do not arrive before ``deadline``, or the connection is lost.
    """
    data = b""
    while len(data) < count:
        connected.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            part = connected.recv(count - len(data))
        except TimeoutError:
            raise TimeoutError(f"nothing came for {HANDSHAKE_TIMEOUT:g} s") from None
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
            # Without a listener on the same machine, a TCP connection may connect to itself.
            connected.close()
            reason = "Connection refused"
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            if isinstance(error, socket.gaierror):
                # The name does not resolve, and would not at a second attempt.
                end = 0.0
        if time.monotonic() >= end:
            raise TransportError(f"the parameter server at {address} cannot be reached: {reason}") from None
        time.sleep(0.1)


def _version() -> bytes:
    return lightkit.__version__.encode()[:32].ljust(32, b"\0")


def _printable(version: bytes) -> str:
    """Returns the version of an untrusted peer without characters that control a terminal."""
    return "".join(c for c in version.rstrip(b"\0").decode("ascii", "replace") if c.isprintable())
