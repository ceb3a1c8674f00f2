"""Membership of workers in a training: the connected workers, the expected ones, and the slowest clock."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable

from lightkit.errors import LightkitError
from lightkit.parameter_server.durable_state import DurableState, WorkerState
from lightkit.parameter_server.protocol import JoinRequest, Reply
from lightkit.parameter_server.transport import Connection, TransportError

_log = logging.getLogger(__name__)


class Membership:
    """The workers of a training and their connections.

    Callers of all methods except `check_current` hold the lock of ``changed``, acquired once.

    Args:
        state: the durable state of the training.
        changed: the condition that is notified at each change of the training.
        timeout: the seconds in which an expected worker must join, and the seconds without any worker after which the
            training ends.

    Attributes:
        connections: the connection of each connected worker, by rank.
        expected: the ranks of the workers that have not joined yet, and that the training waits for.
        joins: the number of times that a worker has joined, reconnections included.
    """

    def __init__(self, state: DurableState, changed: threading.Condition, timeout: float) -> None:
        self._state, self._changed, self._timeout = state, changed, timeout
        self.connections: dict[int, Connection] = {}
        self.expected: set[int] = set()
        self._expected_until = math.inf
        self._alone_since = time.monotonic()
        self.joins = 0

    def expect(self, ranks: Iterable[int]) -> None:
        """Makes the training wait until the workers ``ranks`` have joined, for ``timeout`` seconds at most."""
        self.expected = set(ranks)
        self._expected_until = time.monotonic() + self._timeout

    def active(self) -> set[int]:
        """Returns the ranks of the active workers: those that are connected or expected back, and have not finished."""
        workers = self._state.workers
        return {r for r in self.connections.keys() | self.expected if r in workers and not workers[r].finished}

    def slowest_clock(self, optimizer_index: int) -> int | None:
        """Returns the smallest clock of the active workers for an optimizer; None if no worker is active.

        The clock of an expected worker that has never joined is 0: the others wait for its first pushes, too.
        """
        workers = self._state.workers
        clocks = [workers[rank].clock(optimizer_index) for rank in self.active()]
        return min(clocks + [0 for rank in self.expected if rank not in workers], default=None)

    def join(self, connection: Connection, request: JoinRequest) -> tuple[WorkerState, bool]:
        """Registers a connection as that of a worker, and closes an earlier connection of the same worker.

        Args:
            connection: the connection.
            request: the first message of the worker.

        Returns:
            The state of the worker; and True if the worker's process has not joined before.

        Raises:
            LightkitError: another process with the same rank is connected.
        """
        rank, worker = request.rank, self._state.workers.get(request.rank)
        is_new = worker is None or worker.incarnation != request.incarnation
        if is_new and rank in self.connections:
            raise LightkitError(f"there is a worker {rank} already; a replacement must wait until that worker is gone")
        if worker is None or is_new:
            indices = range(len(request.spec.optimizers))
            worker = WorkerState(
                request.incarnation, [0 for _ in indices], [self.slowest_clock(i) or 0 for i in indices]
            )
            if self._state.spec is not None:
                self._state.workers[rank] = worker
        if (earlier := self.connections.get(rank)) is not None:
            earlier.close()
        self.connections[rank] = connection
        self.expected.discard(rank)
        self.joins += 1
        self._changed.notify_all()
        return worker, is_new

    def disconnect(self, rank: int, connection: Connection) -> bool:
        """Removes ``connection`` as that of the worker ``rank``; returns False if the worker has another connection."""
        if self.connections.get(rank) is not connection:
            return False
        del self.connections[rank]
        self._alone_since = time.monotonic()
        return True

    def check_current(self, connection: Connection, rank: int) -> None:
        """Rejects a connection that is not, or not any more, that of the worker ``rank``.

        Raises:
            TransportError: the server has given up the worker, or the worker has another connection.
        """
        if self.connections.get(rank) is not connection:
            raise TransportError("it was given up, or has a new connection")

    def wait(self, connection: Connection, rank: int | None = None) -> None:
        """Waits for a change of the training, for one heartbeat interval at most.

        If the server has sent nothing for an interval by then, the method sends `Reply.WAIT` as a heartbeat.

        Args:
            connection: the connection of the worker.
            rank: the rank of the worker; None before the worker has joined.

        Raises:
            TransportError: the worker is gone, or has another connection.
        """
        self._changed.wait(connection.heartbeat_interval)
        # The time of the latest frame decides, and not the wait: frequent changes must not delay the heartbeats.
        if time.monotonic() - connection.last_sent >= connection.heartbeat_interval:
            self._changed.release()
            try:
                connection.send_header(Reply.WAIT)
            finally:
                self._changed.acquire()
        connection.poll()
        if rank is not None:
            self.check_current(connection, rank)

    def is_over(self) -> bool:
        """Returns True if all workers have left the training.

        The method also removes expected workers that have not joined within ``timeout`` seconds.

        Raises:
            LightkitError: all workers are lost, and none has come back within ``timeout`` seconds.
        """
        if self.expected and time.monotonic() > self._expected_until:
            word = "worker" if len(self.expected) == 1 else "workers"
            ranks = ", ".join(map(str, sorted(self.expected)))
            _log.warning("continuing without %s %s, which did not come", word, ranks)
            self.expected.clear()
            self._changed.notify_all()
        if self.connections or self.expected or not self._state.workers:
            return False
        if any(worker.left for worker in self._state.workers.values()):
            return True
        # Lost workers may come back, and others may take their places.
        if time.monotonic() - self._alone_since > self._timeout:
            raise LightkitError(f"all workers are gone, and none came for {self._timeout:g} s")
        return False
