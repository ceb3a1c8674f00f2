"""A worker's connection to one server, and what goes over it; made anew when it breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server.compression import codec
from lightkit.parameter_server.door import connect
from lightkit.parameter_server.job import Job, allocate, read_numbers
from lightkit.parameter_server.link import Expected, Link, LinkError
from lightkit.parameter_server.protocol import PUSH_FACTS, Answer, Request, bulk

T = TypeVar("T")


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
        self._link: Link | None = None
        # One that no sign of life comes through any more.
        self._silent: Link | None = None
        self._begin: dict[str, Any] | None = None
        self._has_started = self._has_begun = False
        # One exchange after the other, also of two tables.
        self._turn = threading.Lock()

    @property
    def heartbeat(self) -> float:
        """Seconds from one sign of life to the next."""
        link = self._link
        return 1.0 if link is None else link.heartbeat

    def start(self, begin: dict[str, Any]) -> bool:
        """Connects; begins the job where the server has none, and says whether that was so."""
        self._begin = begin
        self._try(lambda link: None)
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

        def exchange(link: Link) -> None:
            reply = self._expect(link, table)
            link.send_header(Request.PUSH, table, place.number, place.version)
            link.send(place.facts, *place.wire, tag=bulk(table))
            self.bytes_sent += place.facts.nbytes + sum(tensor.nbytes for tensor in place.wire)
            answer = self._answer(link)
            if answer[0] == Answer.NORM:
                square = torch.zeros(1, dtype=torch.float64)
                link.receive(square)
                link.send(torch.tensor([factor(self.address, square.item())], dtype=torch.float64))
                answer = self._answer(link)
            self._take(place, reply, answer)

        self._try(exchange)

    def pull(self, table: int) -> None:
        """Takes the parameters as they are."""

        def exchange(link: Link) -> None:
            reply = self._expect(link, table)
            link.send_header(Request.PULL, table)
            self._take(self.places[table], reply, self._answer(link))

        self._try(exchange)

    def state(self) -> list[dict[str, Any]]:
        """All that the server has, by table."""

        def exchange(link: Link) -> list[dict[str, Any]]:
            link.send_header(Request.STATE)
            self._answer(link)
            return link.receive_message()

        return self._try(exchange)

    def ask(self, request: Request) -> None:
        """For what the answer says nothing of."""

        def exchange(link: Link) -> None:
            link.send_header(request)
            self._answer(link)

        self._try(exchange)

    def live(self, rank: int) -> None:
        """Gives a sign of life."""
        link = self._link
        if link is not None and link is not self._silent:
            try:
                link.live(rank)
            except LinkError:
                # The next exchange will find out.
                self._silent = link

    def abandon(self) -> None:
        """Lets go of the connection; an exchange that is under way keeps it until its end."""
        self._link = None

    def leave(self) -> None:
        """Ends the connection."""
        link, self._link = self._link, None
        if link is not None:
            try:
                link.send_header(Request.LEAVE)
            except LinkError:
                pass
            link.close()

    def _expect(self, link: Link, table: int) -> Expected:
        link.expect_header()
        return link.expect(*self.places[table].reply, tag=bulk(table))

    def _take(self, place: Place, reply: Expected, answer: list[int]) -> None:
        reply.wait()
        place.version = answer[1]
        self.bytes_received += sum(tensor.nbytes for tensor in place.reply)

    def _answer(self, link: Link) -> list[int]:
        while (answer := link.receive_header())[0] == Answer.WAIT:
            self._look_for_the_end()
        if answer[0] == Answer.REFUSED:
            reason = link.receive_message()["error"]
            raise ConfigError(f"the parameter server at {self.address} refuses this worker: {reason}")
        return answer

    def _look_for_the_end(self) -> None:
        if self._ended.is_set():
            raise LightkitError("the training has ended")

    def _try(self, exchange: Callable[[Link], T]) -> T:
        with self._turn:
            until = time.monotonic() + self._patience
            while True:
                self._look_for_the_end()
                try:
                    if self._link is None:
                        self._connect(until)
                    return exchange(self._link)
                except LinkError as error:
                    now = time.monotonic()
                    if self._link is not None:
                        # It was there until now, however long the exchange took.
                        self._link.close()
                        self._link = None
                        until = now + self._patience
                    elif now >= until:
                        raise LightkitError(
                            f"the parameter server at {self.address} did not come back in {self._patience:g} s: {error}"
                            if self._has_started
                            else str(error)
                        ) from None
                    time.sleep(0.1)

    def _connect(self, until: float) -> None:
        link = connect(self.address, self._secret, self._who, max(until - time.monotonic(), 0.1), self._timeout)
        # From here on signs of life are wanted.
        self._link = link
        self._answer(link)
        joined = link.receive_message()
        # Often enough for both, whoever is the less patient.
        link.heartbeat = min(self._timeout, joined["timeout"]) / 5
        if not joined["begun"]:
            if self._has_started:
                raise LightkitError(
                    f"the parameter server at {self.address} came back without the parameters: it needs a "
                    "directory, and snapshot_every above 0"
                )
            link.send_header(Request.BEGIN)
            link.send_message({"job": self.job.to_json(), **self._begin})
            self._answer(link)
            self._has_begun = True
        self._has_started = True
