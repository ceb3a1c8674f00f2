"""How a worker and a server meet: at a store of torch.distributed, where each shows that it knows the secret."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import PrefixStore, ProcessGroupGloo, QueueEmptyError, TCPStore

import lightkit
from lightkit.errors import ConfigError
from lightkit.parameter_server.link import HANDSHAKE, Link, LinkError, brief

T = TypeVar("T")

# In the environment of workers and servers, where nobody else gives it to them.
SECRET = "LIGHTKIT_SECRET"

# Bytes of what is said before the secret has been shown.
_LONGEST_HELLO = 1 << 12

# Where a server's store has the workers that want to connect.
DOOR = "lightkit/door"


class Listener:
    """Where workers find a server: a store of torch.distributed at an address.

    Who connects first shows by messages in the store that it knows the secret. Only then do the two connect by gloo,
    which trusts the other side to send as much as is expected.

    Args:
        host: of this machine, to be reached by the workers; ``127.0.0.1`` for those on this machine alone.
        port: 0 for any free one.
        secret: that workers must know.

    Raises:
        ConfigError: the address is not one of this machine, or the port is in use.
    """

    def __init__(self, host: str, port: int, secret: str) -> None:
        listening = socket.socket(_family(host))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            listening.close()
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"a parameter server cannot listen on {host}:{port}: {reason}") from None
        listening.listen(4096)
        self.host, self.port = host, listening.getsockname()[1]
        self._secret = secret
        # The socket is the store's from here on.
        self._store = TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        # A store answers one question after the other: whoever waits for something asks through one of its own.
        self._signs = self._store.clone()

    def accept(self, seconds: float) -> Knock | None:
        """The next worker that wants to connect, as `connect` takes it, or None if there is none for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                text = self._store.queue_pop(DOOR, block=False)
            except QueueEmptyError:
                time.sleep(0.01)
                continue
            if (knock := Knock.read(text)) is not None:
                return knock
        return None

    def signs_of_life(self, rank: int) -> bytes:
        """What changes as long as that worker is there: see `Link.live`."""
        key = f"alive/{rank}"
        return self._signs.get(key) if self._signs.check([key]) else b""

    def connect(self, knock: Knock) -> tuple[Link, dict[str, Any]]:
        """Connects with a worker, and returns what it says of itself, once it has shown that it knows the secret.

        Raises:
            LinkError: it did not come, or does not know it; it has been told.
        """
        store = self._store.clone()
        store.set_timeout(timedelta(seconds=HANDSHAKE))
        talk = Talk(store, knock.name)
        try:
            nonce = secrets.token_hex(16)
            talk.say("greeting", nonce=nonce, version=lightkit.__version__)
            hello = talk.hear("hello", "proof", "version")
            if not _same(hello["proof"], _proof(self._secret, "worker", nonce, knock.nonce)):
                talk.say("answer", error=f"the secret is not that of the server ({SECRET})")
                raise LinkError("a worker came with another secret")
            if hello["version"] != lightkit.__version__:
                message = f"the worker has lightkit {hello['version']}, the server {lightkit.__version__}"
                talk.say("answer", error=message)
                raise LinkError(message)
            talk.say("answer", proof=_proof(self._secret, "server", nonce, knock.nonce))
            link = Link(_group(PrefixStore(knock.name, store), 0, knock.host), 0, store)
            return link, link.receive_message()
        except RuntimeError as error:
            raise LinkError(f"a worker knocked and went away: {brief(error)}") from None
        finally:
            # Not the answer, which the worker may still have to hear.
            talk.forget("greeting", "hello")


@dataclass(frozen=True)
class Knock:
    """What a worker says at the door, and anybody may say.

    Args:
        name: that it has given to the connection.
        host: address of the server by which it has come.
        nonce: its part of what the server must prove to know the secret with.
    """

    name: str
    host: str
    nonce: str

    @classmethod
    def read(cls, text: bytes) -> Knock | None:
        """That of a message, or None if it is none."""
        found = _read(text)
        if found is None or found.keys() != {"name", "host", "nonce"}:
            return None
        return cls(**found)


class Talk:
    """Short messages between two processes in a store, by which each shows the other that it knows a secret."""

    def __init__(self, store: TCPStore, name: str) -> None:
        self._store, self._name = store, name

    def say(self, what: str, **facts: str) -> None:
        """Leaves facts for the other side."""
        self._store.set(f"{self._name}/{what}", json.dumps(facts))

    def hear(self, what: str, *facts: str) -> dict[str, str]:
        """What the other side says, with these facts in it; it is taken away by that.

        Raises:
            RuntimeError: it says nothing, or something else.
        """
        key = f"{self._name}/{what}"
        found = _read(self._store.get(key))
        self._store.delete_key(key)
        if found is None or not found.keys() >= set(facts):
            raise RuntimeError(f"its {what} is none")
        return found

    def forget(self, *everything: str) -> None:
        """Removes what was said."""
        with contextlib.suppress(RuntimeError):
            for what in everything:
                self._store.delete_key(f"{self._name}/{what}")


def _read(text: bytes) -> dict[str, str] | None:
    """Facts that are strings, or None; of whoever has come, so that it may be anything."""
    try:
        found = json.loads(text) if len(text) <= _LONGEST_HELLO else None
    except (ValueError, RecursionError):
        return None
    strings = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if strings else None


def connect(address: str, secret: str, who: dict[str, Any], patience: float, silence: float) -> Link:
    """Connects with a server.

    Args:
        address: ``HOST:PORT``.
        secret: the server's.
        who: what it is told of this worker.
        patience: seconds in which it must have come up.
        silence: seconds without an answer after which it counts as gone.

    Raises:
        LinkError: it cannot be reached.
        ConfigError: another secret or version, an address that is none.
    """
    host, port = split_address(address)
    local, remote = _reach(host, port, time.monotonic() + patience, address)
    knock = Knock(f"link/{secrets.token_hex(16)}", remote, secrets.token_hex(16))
    try:
        store = _within(HANDSHAKE, lambda: _knock(host, port, knock))
        talk = Talk(store, knock.name)
        greeting = talk.hear("greeting", "nonce", "version")
        proof = _proof(secret, "worker", greeting["nonce"], knock.nonce)
        talk.say("hello", proof=proof, version=lightkit.__version__)
        answer = talk.hear("answer")
    except RuntimeError as error:
        raise LinkError(
            f"the parameter server at {address} does not answer as one: {brief(error)}; is that another program, or "
            "is only this one port open to it?"
        ) from None
    if "error" in answer:
        raise ConfigError(f"the parameter server at {address} refuses this worker: {answer['error']}")
    if not _same(answer.get("proof", ""), _proof(secret, "server", greeting["nonce"], knock.nonce)):
        raise ConfigError(f"whoever listens at {address} does not know the secret ({SECRET})")
    link = Link(_group(PrefixStore(knock.name, store), 1, local), 1, store)
    link.send_message(who)
    link.wait_for_at_most(silence)
    return link


def _knock(host: str, port: int, knock: Knock) -> TCPStore:
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=HANDSHAKE))
    # One message: who ends here has said all of it or nothing.
    store.queue_push(DOOR, json.dumps(asdict(knock)))
    return store


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may never return: torch's store waits for ever for an answer of the other side."""
    outcome: queue.Queue[tuple[Any, RuntimeError | None]] = queue.Queue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except RuntimeError as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError(f"nothing came for {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def split_address(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ConfigError: it is not ``HOST:PORT``.
    """
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"the address of a parameter server must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def _reach(host: str, port: int, end: float, address: str) -> tuple[str, str]:
    """This side's and the other side's address of a connection, once there can be one."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.1)) as probe:
                return probe.getsockname()[0], probe.getpeername()[0]
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            # A name that does not resolve will not do so in a minute.
            if isinstance(error, socket.gaierror) or time.monotonic() >= end:
                raise LinkError(f"the parameter server at {address} cannot be reached: {reason}") from None
        time.sleep(0.1)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _group(store: PrefixStore, rank: int, host: str) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=HANDSHAKE)
    try:
        return ProcessGroupGloo(store, rank, 2, options)
    except RuntimeError as error:
        raise LinkError(brief(error)) from None


def _proof(secret: str, side: str, *nonces: str) -> str:
    return hmac.new(secret.encode(), "/".join([side, *nonces]).encode(), hashlib.sha256).hexdigest()


def _same(one: str, another: str) -> bool:
    # As bytes: a string of whoever has come may have anything in it.
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), another.encode())
