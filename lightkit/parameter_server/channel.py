"""A worker's connection to one server, and what goes over it; made anew when it breaks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server.compression import codec
from lightkit.parameter_server.job import Job, allocate, read_numbers
from lightkit.parameter_server.protocol import PUSH_FACTS, Answer, Request
from lightkit.parameter_server.rendezvous import connect
from lightkit.parameter_server.transport import Connection, ProtocolError, TransportError, heartbeat_of

T = TypeVar("T")

# Seconds from one sign of life to the next where no connection says how often they are wanted.
_HEARTBEAT = 0.2

# Connections that may break in one exchange: a server that ends each of them, however often it comes back, would have
# the worker begin again for ever.
_MOST_ATTEMPTS = 30


class Place:
    """A table's gradients and parameters on their way to and from one server."""

    def __init__(self, job: Job, table: int) -> None:
        self.parameters = job.tables[table].parameters
        self.flats, self.views = allocate(self.parameters)
        self.codecs = [codec(flat, job.compression, job.fraction) for flat in self.flats]
        self.wire = [tensor for c in self.codecs for tensor in c.wire]
        self.reply, self.reply_views = allocate(self.parameters)
        self.present = [True] * len(self.parameters)
        self.groups = sorted({p.group for p in self.parameters})
        self.facts = torch.zeros(0, dtype=torch.float64)
        self.number = 0
        self.version = 0


class Channel:
    """The connection to one server; made anew when it breaks."""

    def __init__(
        self,
        address: str,
        secret: str,
        who: dict[str, Any],
        job: Job,
        timeout: float,
        patience: float,
        ended: threading.Event,
    ) -> None:
        self.job = job
        self.places = [Place(job, table) for table in range(len(job.tables))]
        self.bytes_sent = 0
        self.bytes_received = 0
        self.address, self._secret, self._who = address, secret, who
        self._timeout, self._patience, self._ended = timeout, patience, ended
        self._connection: Connection | None = None
        # One that no sign of life comes through any more.
        self._silent: Connection | None = None
        self._begin: dict[str, Any] | None = None
        self._has_started = self._has_begun = False
        # One exchange after the other, also of two tables.
        self._turn = threading.Lock()

    @property
    def heartbeat(self) -> float:
        """Seconds from one sign of life to the next."""
        connection = self._connection
        return _HEARTBEAT if connection is None else connection.heartbeat

    def start(self, begin: dict[str, Any]) -> bool:
        """Connects; begins the job where the server has none, and says whether that was so."""
        self._begin = begin
        self._try(lambda connection: None)
        self._begin = None
        return self._has_begun

    def load(self, table: int, gradients: Sequence[Tensor | None]) -> None:
        """Copies gradients into the memory that is sent."""
        place = self.places[table]
        place.present = [gradient is not None for gradient in gradients]
        pairs = list(zip(place.views, gradients, strict=True))
        if given := [(view, gradient) for view, gradient in pairs if gradient is not None]:
            torch._foreach_copy_([view for view, _ in given], [gradient for _, gradient in given])
        for view, gradient in pairs:
            if gradient is None:
                view.zero_()

    def encode(self, table: int, facts: Sequence[float], groups: Sequence[dict[str, Any]], skip: bool) -> None:
        """Compresses what was loaded, unless it is to be left out, and gives the push its number."""
        place = self.places[table]
        for sent in place.codecs:
            if skip:
                sent.encode_nothing()
            else:
                sent.encode()
        where = self.job.tables[table].numbers
        numbers = [value for number in place.groups for value in read_numbers(groups[number], where[number])]
        place.facts = torch.tensor([*map(float, facts), *numbers, *map(float, place.present)], dtype=torch.float64)
        assert len(facts) == PUSH_FACTS
        place.number += 1

    def push(self, table: int, factor: Callable[[str, float], float]) -> None:
        """Sends, and waits for the parameters after the step; as often as it takes, it counts once."""
        place = self.places[table]

        def exchange(connection: Connection) -> None:
            connection.send_header(Request.PUSH, table, place.number, place.version)
            connection.send(place.facts, *place.wire)
            self.bytes_sent += place.facts.nbytes + sum(tensor.nbytes for tensor in place.wire)
            answer = self._answer(connection, Answer.OK, Answer.NORM)
            if answer[0] == Answer.NORM:
                square = torch.zeros(1, dtype=torch.float64)
                connection.receive(square)
                connection.send(torch.tensor([factor(self.address, square.item())], dtype=torch.float64))
                answer = self._answer(connection)
            self._take(place, connection, answer)

        self._try(exchange)

    def pull(self, table: int) -> None:
        """Takes the parameters as they are."""

        def exchange(connection: Connection) -> None:
            connection.send_header(Request.PULL, table)
            self._take(self.places[table], connection, self._answer(connection))

        self._try(exchange)

    def state(self) -> list[dict[str, Any]]:
        """Returns all that the server has: by table ``flats``, ``state`` by parameter, ``seeds`` by group."""

        def exchange(connection: Connection) -> list[dict[str, Any]]:
            connection.send_header(Request.STATE)
            self._answer(connection)
            found = connection.receive_message(self.job.most_bytes)
            if not self._is_state(found):
                raise ProtocolError("the server sent the state of other parameters")
            return found

        return self._try(exchange)

    def _is_state(self, found: Any) -> bool:
        """Returns whether that is the state of this connection's parameters: it goes into a checkpoint."""
        if not isinstance(found, list) or len(found) != len(self.places):
            return False
        return all(map(_is_state_of, found, self.places))

    def ask(self, request: Request) -> None:
        """Sends a request whose reply has no payload."""

        def exchange(connection: Connection) -> None:
            connection.send_header(request)
            self._answer(connection)

        self._try(exchange)

    def send_heartbeat(self) -> None:
        """Gives a sign of life."""
        connection = self._connection
        if connection is not None and connection is not self._silent:
            try:
                connection.send_heartbeat()
            except TransportError:
                # The next exchange will find out.
                self._silent = connection

    def abandon(self) -> None:
        """Ends the connection without a word; an exchange that is under way finds it gone."""
        if (connection := self._connection) is not None:
            connection.close()

    def leave(self) -> None:
        """Ends the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.send_header(Request.LEAVE)
            except TransportError:
                pass
            connection.release()

    def _take(self, place: Place, connection: Connection, answer: list[int]) -> None:
        connection.receive(*place.reply)
        place.version = answer[1]
        self.bytes_received += sum(tensor.nbytes for tensor in place.reply)

    def _answer(self, connection: Connection, *expected: Answer) -> list[int]:
        while (answer := connection.receive_header())[0] == Answer.WAIT:
            self._look_for_the_end()
        if answer[0] == Answer.REFUSED:
            message = connection.receive_message()
            reason = message.get("error") if isinstance(message, dict) else None
            raise ConfigError(f"the parameter server at {self.address} refuses this worker: {reason}")
        if answer[0] not in (expected or (Answer.OK,)):
            raise ProtocolError(f"the server answered {answer[0]}")
        return answer

    def _look_for_the_end(self) -> None:
        if self._ended.is_set():
            raise LightkitError("the training has ended")

    def _try(self, exchange: Callable[[Connection], T]) -> T:
        with self._turn:
            until = time.monotonic() + self._patience
            broken = 0
            while True:
                self._look_for_the_end()
                try:
                    return exchange(self._connection or self._connect(until))
                except TransportError as error:
                    now = time.monotonic()
                    if (connection := self._connection) is not None:
                        self._connection = None
                        connection.release()
                        # It was there until now, however long the exchange took.
                        until = now + self._patience
                        broken += 1
                    elif now >= until:
                        raise LightkitError(
                            f"the parameter server at {self.address} did not come back in {self._patience:g} s: {error}"
                            if self._has_started
                            else str(error)
                        ) from None
                    if broken == _MOST_ATTEMPTS:
                        raise LightkitError(
                            f"the parameter server at {self.address} broke {broken} connections in a row: {error}"
                        ) from None
                    time.sleep(0.1)

    def _connect(self, until: float) -> Connection:
        who, patience = self._who, max(until - time.monotonic(), 0.1)
        connection = connect(self.address, self._secret, who, patience, self._timeout)
        # From here on signs of life are wanted.
        self._connection = connection
        self._answer(connection)
        joined = connection.receive_message()
        try:
            begun, timeout = bool(joined["begun"]), float(joined["timeout"])
        except (KeyError, TypeError, ValueError):
            timeout = 0.0
        if not 0 < timeout < math.inf:
            raise ProtocolError("the server's first message must say begun and timeout")
        # Often enough for both, whoever is the less patient.
        connection.heartbeat = heartbeat_of(min(self._timeout, timeout))
        if not begun:
            if self._has_started:
                raise LightkitError(
                    f"the parameter server at {self.address} came back without the parameters: it needs a "
                    "directory, and snapshot_every above 0"
                )
            connection.send_header(Request.BEGIN)
            connection.send_message({"job": self.job.to_json(), **self._begin})
            self._answer(connection)
            self._has_begun = True
        self._has_started = True
        return connection


def _is_state_of(part: Any, place: Place) -> bool:
    parts = [part.get(name) for name in ("flats", "state", "seeds")] if isinstance(part, dict) else [None]
    if not all(isinstance(entry, list) for entry in parts):
        return False
    flats, state, seeds = parts
    if [len(flats), len(state), len(seeds)] != [len(place.flats), len(place.parameters), len(place.groups)]:
        return False
    same = all(
        isinstance(flat, Tensor) and flat.dtype == own.dtype and flat.shape == own.shape
        for flat, own in zip(flats, place.flats, strict=True)
    )
    return (
        same
        and all(isinstance(entry, dict) for entry in state)
        and all(seed is None or type(seed) is int for seed in seeds)
    )
