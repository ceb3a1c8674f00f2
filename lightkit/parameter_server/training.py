"""A training on one server: the objects that the sessions of all workers share."""

from __future__ import annotations

import threading
import time

from lightkit.errors import LightkitError
from lightkit.parameter_server.aggregation import Aggregator
from lightkit.parameter_server.available_memory import check_memory
from lightkit.parameter_server.durable_state import DurableState, WorkerState
from lightkit.parameter_server.membership import Membership
from lightkit.parameter_server.protocol import JoinRequest
from lightkit.parameter_server.status import ServerStatus, WorkerStatus
from lightkit.parameter_server.training_spec import TrainingSpec
from lightkit.parameter_server.transport import Connection, ProtocolError
from lightkit.parameter_server.write_ahead_log import WriteAheadLog

# Seconds in which the other workers wait for worker 0, which a person may start by hand.
_FIRST_WORKER_TIMEOUT = 600.0


class Training:
    """A training on one server; each method acquires the lock of ``changed`` itself.

    Args:
        log: the write-ahead log; None for a server that does not recover.
        timeout: the seconds without a heartbeat after which a worker counts as gone.

    Attributes:
        timeout: the argument of that name.
        changed: a condition whose lock guards all parts, and that is notified at each change.
        state: parameters, optimizers and counted pushes.
        members: the workers and their connections.
        aggregator: the aggregator, which makes updates from pushes.
    """

    def __init__(self, log: WriteAheadLog | None, timeout: float) -> None:
        self.timeout = timeout
        self.changed = threading.Condition()
        self.state = DurableState(log)
        self.members = Membership(self.state, self.changed, timeout)
        self.aggregator = Aggregator(self.state, self.members, self.changed)

    def recover(self) -> None:
        """Recovers from the snapshot and the log if there are any, and then expects their unfinished workers back.

        Raises:
            CheckpointError: the snapshot or the log is damaged.
        """
        with self.changed:
            if self.state.recover():
                self.aggregator.reset()
                self.members.expect(rank for rank, worker in self.state.workers.items() if not worker.finished)

    def join(self, connection: Connection, request: JoinRequest) -> tuple[WorkerState, bool]:
        """Registers a connection as that of a worker; a worker other than worker 0 waits until the training has begun.

        Args:
            connection: the connection.
            request: the first message of the worker.

        Returns:
            The state of the worker; and True if the training has begun, False if worker 0 must begin it.

        Raises:
            LightkitError: the worker has another specification, its rank is taken, or worker 0 does not come.
            TransportError: the worker is gone.
        """
        with self.changed:
            deadline = time.monotonic() + _FIRST_WORKER_TIMEOUT
            while self.state.spec is None and request.rank != 0:
                self.members.wait(connection)
                if time.monotonic() > deadline:
                    raise LightkitError(
                        f"worker 0, which brings the parameters, did not come in {_FIRST_WORKER_TIMEOUT:g} s"
                    )
            spec = self.state.spec
            if spec is not None and (difference := spec.difference(request.spec)) is not None:
                raise LightkitError(difference)
            worker, is_new = self.members.join(connection, request)
            if is_new:
                self.aggregator.forget(request.rank)
            return worker, spec is not None

    def remove(self, rank: int, connection: Connection) -> None:
        """Removes ``connection`` as that of the worker ``rank``, unless the worker has another connection by now."""
        with self.changed:
            if self.members.disconnect(rank, connection):
                self.aggregator.reopen(self.members.connections.keys())
                self.changed.notify_all()

    def begin(self, connection: Connection, request: JoinRequest, worker: WorkerState) -> None:
        """Receives the parameters and optimizer states of worker 0, and begins the training.

        Args:
            connection: the connection of the worker.
            request: the first message of the worker.
            worker: the state of the worker.

        Raises:
            LightkitError: there is too little memory, or the values do not fit.
            ProtocolError: the message is invalid, or the training has begun already.
            OSError: the snapshot cannot be written.
        """
        check_memory(2 * request.spec.nbytes)
        message = connection.receive_message(request.spec.max_message_bytes)
        with self.changed:
            if self.state.spec is not None:
                raise ProtocolError("the training has begun already")
            try:
                spec = TrainingSpec.from_json(message["job"])
                if (difference := request.spec.difference(spec)) is not None:
                    raise ProtocolError(difference)
                self.state.begin(spec, message, request.rank, worker)
            except (KeyError, TypeError, AttributeError) as error:
                raise ProtocolError(f"the training cannot begin: {error}") from None
            self.aggregator.reset()
            self.members.expect(set(range(spec.workers)) - {request.rank})
            self.changed.notify_all()

    def finish(self, connection: Connection, rank: int, worker: WorkerState) -> None:
        """Marks a worker as one that pushes no more, and waits until no worker is active or expected.

        Args:
            connection: the connection of the worker.
            rank: the rank of the worker.
            worker: the state of the worker.

        Raises:
            TransportError: the worker is gone.
        """
        with self.changed:
            worker.finished = True
            self.changed.notify_all()
            while self.members.expected or self.members.active():
                self.members.wait(connection, rank)

    def is_over(self, seconds: float) -> bool:
        """Returns True if all workers have left; False otherwise, or if the lock is not free within ``seconds``.

        Raises:
            LightkitError: all workers are lost, and none has come back within ``timeout`` seconds.
        """
        if not self.changed.acquire(timeout=seconds):
            return False
        try:
            return self.members.is_over()
        finally:
            self.changed.release()

    def status(self, sessions: int) -> ServerStatus:
        """Returns the status of the server.

        Args:
            sessions: the number of the server's connections, with those of peers that have not joined.
        """
        with self.changed:
            connections = self.members.connections
            return ServerStatus(
                versions=tuple(self.state.versions),
                workers={
                    rank: WorkerStatus(
                        tuple(worker.pushes),
                        worker.finished,
                        self.aggregator.pending(rank, connections.get(rank)),
                    )
                    for rank, worker in self.state.workers.items()
                },
                connected=frozenset(connections),
                expected=frozenset(self.members.expected),
                sessions=sessions,
                joins=self.members.joins,
            )
