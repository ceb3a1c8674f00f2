"""What a server has of its workers: what must not be forgotten, pushes that have arrived, and those of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkit.parameter_server.compression import codec
from lightkit.parameter_server.job import Job, allocate
from lightkit.parameter_server.protocol import PUSH_FACTS
from lightkit.parameter_server.transport import Connection, ProtocolError


@dataclass
class Worker:
    """What a server must not forget of a worker.

    Args:
        incarnation: another one is another process that has its place.
        pushes: that count, by table.
        ahead: what is added to them to compare workers: who comes later begins where the slowest is.
        finished: it pushes no more.
        left: it said so, after all had finished.
    """

    incarnation: str
    pushes: list[int]
    ahead: list[int]
    finished: bool = False
    left: bool = False


class Inbox:
    """Where the pushes of a worker arrive, for one table."""

    def __init__(self, job: Job, table: int, numbers: int) -> None:
        parameters = job.tables[table].parameters
        self.flats, self.views = allocate(parameters)
        self.codecs = [codec(flat, job.compression, job.fraction) for flat in self.flats]
        self.wire = [tensor for c in self.codecs for tensor in c.wire]
        self.facts = torch.zeros(PUSH_FACTS + numbers + len(parameters), dtype=torch.float64)
        self.reply = [torch.empty_like(flat) for flat in self.flats]
        self._numbers = numbers

    def receive(self, connection: Connection) -> None:
        """Takes a push.

        Raises:
            ProtocolError: it has another size, or positions beyond the gradient.
            TransportError: the worker is gone.
        """
        connection.receive(self.facts, *self.wire)
        try:
            for received in self.codecs:
                received.decode()
        except (IndexError, RuntimeError) as error:
            raise ProtocolError(f"a push cannot be decompressed: {error}") from None

    @property
    def numbers(self) -> list[float]:
        """The optimizer's options of this push."""
        return self.facts[PUSH_FACTS : PUSH_FACTS + self._numbers].tolist()

    @property
    def present(self) -> list[bool]:
        """Which gradients there are."""
        return [value != 0 for value in self.facts[PUSH_FACTS + self._numbers :].tolist()]


class Round:
    """Of ``sync``: the pushes of a table that the next step is made of."""

    def __init__(self) -> None:
        # By rank, with the number of the push and whose it is: somebody else may have come to the rank since.
        self.pushes: dict[int, tuple[Inbox, int, Worker]] = {}
        # Once they are averaged nobody joins, unless all that pushed are gone.
        self.mean: list[Tensor] | None = None
        self.views: list[Tensor] = []
        # The sum of the squares of its part here, and whether the workers want to say how far to clip it.
        self.norm = 0.0
        self.needs_norm = False
        # Why there was no step.
        self.error: Exception | None = None
