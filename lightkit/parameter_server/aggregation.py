"""Aggregation of pushes into updates: one push at a time, or the mean of one push of each worker."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from lightkit.parameter_server.durable_state import CountedPush, DurableState, Update, WorkerState
from lightkit.parameter_server.flat_tensors import allocate_flat
from lightkit.parameter_server.mask_update import MaskUpdate
from lightkit.parameter_server.membership import Membership
from lightkit.parameter_server.protocol import Reply
from lightkit.parameter_server.push_buffers import PushBuffers
from lightkit.parameter_server.transport import Connection


@dataclass(frozen=True)
class Push:
    """A push that a server has received.

    Args:
        connection: the connection by which the push came.
        rank: the rank of the worker that sent the push.
        worker: the state of that worker; a replacement with the same rank has another state.
        optimizer_index: the index of the optimizer.
        push_seq: the sequence number of the push among those of the worker for this optimizer, from 1.
        version: the version of the parameters with which the gradient was computed: the number of updates before.
        buffers: the buffers with the gradient.
        masks: the masks that the worker has sent before the push; None for none.
    """

    connection: Connection
    rank: int
    worker: WorkerState
    optimizer_index: int
    push_seq: int
    version: int
    buffers: PushBuffers
    masks: MaskUpdate | None = None

    @property
    def is_repeated(self) -> bool:
        """True if an update counts the push already: the worker sends it again, since the reply was lost."""
        return self.push_seq <= self.worker.pushes[self.optimizer_index]


class AggregationRound:
    """The pushes of all workers that make one step in the mode ``sync``.

    Attributes:
        pushes: the pushes by the rank of the worker.
        mean: the mean gradient, one flat tensor for each dtype; None while the round is open for pushes.
        views: views of ``mean``, one in the shape of each parameter.
        square_norm: the sum of the squares of the mean gradient's elements on this server.
        needs_norm: True if the workers reply to ``square_norm`` with a factor of the mean gradient.
        error: the exception of the failed step; None if the step has not failed.
    """

    def __init__(self) -> None:
        self.pushes: dict[int, Push] = {}
        self.mean: list[Tensor] | None = None
        self.views: list[Tensor] = []
        self.square_norm = 0.0
        self.needs_norm = False
        self.error: Exception | None = None

    def average(self) -> None:
        """Computes the mean gradient and its norm, and clamps its elements to the smallest ``max_value`` of the pushes.

        The caller has set ``mean`` and ``views`` to zeros.
        """
        buffers = [self.pushes[rank].buffers for rank in sorted(self.pushes)]
        for push in buffers:
            for mean, flat in zip(self.mean or [], push.flats, strict=True):
                mean.add_(flat, alpha=1 / len(buffers))
        if bounds := [push.max_value for push in buffers if push.max_value > 0]:
            for mean in self.mean or []:
                mean.clamp_(-min(bounds), min(bounds))
        self.needs_norm = any(push.needs_norm for push in buffers)
        norms = torch._foreach_norm(self.views) if self.views else []
        self.square_norm = math.fsum(norm.double().item() ** 2 for norm in norms)


class Aggregator:
    """An aggregator that makes updates from pushes.

    Args:
        state: the durable state, which applies the updates.
        members: the workers and their connections.
        changed: the condition whose lock guards the training, and that is notified at each change.
    """

    def __init__(self, state: DurableState, members: Membership, changed: threading.Condition) -> None:
        self._state, self._members, self._changed = state, members, changed
        # For each optimizer the round that is open or waits for its factor, and the latest one whose step was made.
        self._rounds: list[AggregationRound] = []
        self._latest: list[AggregationRound] = []

    def reset(self) -> None:
        """Opens a new round for each optimizer of the training; the caller holds the lock of ``changed``."""
        self._rounds = [AggregationRound() for _ in self._state.shards]
        self._latest = [AggregationRound() for _ in self._state.shards]

    def forget(self, rank: int) -> None:
        """Removes the pushes of the worker ``rank``, which another process has replaced, from the open rounds.

        The caller holds the lock of ``changed``.
        """
        for current in self._rounds:
            if current.mean is None:
                current.pushes.pop(rank, None)

    def reopen(self, connected: Collection[int]) -> None:
        """Opens each closed round whose workers are all gone: no worker is left that could reply to the norm.

        The caller holds the lock of ``changed``.

        Args:
            connected: the ranks of the connected workers.
        """
        for current in self._rounds:
            if current.mean is not None and current.pushes.keys().isdisjoint(connected):
                current.mean = None

    def pending(self, rank: int, connection: Connection | None) -> frozenset[int]:
        """Returns the indices of the optimizers whose round has a push of worker ``rank`` that came by ``connection``.

        The caller holds the lock of ``changed``. For a worker without a connection (None) the set is empty.
        """
        pushes = (current.pushes.get(rank) for current in self._rounds)
        return frozenset(i for i, push in enumerate(pushes) if push is not None and push.connection is connection)

    def step_alone(self, push: Push, staleness: int | None) -> None:
        """Makes an optimizer step with the gradient of one push, in the modes ``async`` and ``bounded``.

        A repeated push makes no step.

        Args:
            push: the push.
            staleness: the number of pushes by which a worker may be ahead of the slowest worker. The call returns when
                the worker of ``push`` is no further ahead; with None it returns at once.

        Raises:
            TransportError: the worker of ``push`` is gone or has a new connection.
        """
        with self._changed:
            if not push.is_repeated:
                buffers = push.buffers
                update = self._make_update(push, buffers.is_skipped, buffers.present, [push])
                self._apply(update, buffers.flats, buffers.views)
            if staleness is not None:
                while self._lead(push) > staleness:
                    self._members.wait(push.connection, push.rank)

    def _lead(self, push: Push) -> int:
        slowest = self._members.slowest_clock(push.optimizer_index)
        if slowest is None:
            return 0
        return self._state.workers[push.rank].clock(push.optimizer_index) - slowest

    def step_together(self, push: Push) -> None:
        """Adds a push to its round, and makes a step with the mean gradient once each active worker has a push in it.

        The call returns after that step; a push that is left out does not wait for it. `Membership.active` says which
        workers are active. Two kinds of pushes are left out: a repeated push, and a push whose gradient belongs to an
        earlier version of the parameters.

        Raises:
            TransportError: the worker of ``push`` is gone or has a new connection.
            Exception: the step failed; the calls for all pushes of the round raise the same exception.
        """
        index = push.optimizer_index
        with self._changed:
            if push.is_repeated:
                current = self._latest[index]
            elif push.version < self._state.versions[index]:
                # The other workers have made this step without the push: its gradient is of earlier parameters.
                push.worker.pushes[index] = push.push_seq
                current = self._latest[index]
            else:
                current = self._wait_until_closed(push)
                _raise(current.error)
            if not current.needs_norm:
                self._finish(index, current, 1.0)
                return
        # Each worker gets the norm, even after the step: it adds up the parts of all servers, and the factor that it
        # computes may be the first to reach another server.
        push.connection.send_header(Reply.NORM)
        push.connection.send(torch.tensor([current.square_norm], dtype=torch.float64))
        factor = torch.zeros(1, dtype=torch.float64)
        push.connection.receive(factor)
        with self._changed:
            # All workers compute the same factor.
            self._finish(index, current, factor.item())
            _raise(current.error)

    def _wait_until_closed(self, push: Push) -> AggregationRound:
        """Adds a push to its round, and returns the round when it is closed, or when its step was made or failed."""
        rank, index = push.rank, push.optimizer_index
        current = self._rounds[index]
        while current is self._rounds[index]:
            present = current.pushes.get(rank)
            if current.mean is None and (present is None or present.buffers is not push.buffers):
                current.pushes[rank] = push
                self._changed.notify_all()
            if current.mean is None and self._is_complete(current):
                self._close(index, current)
            if current.mean is not None and rank in current.pushes:
                break
            self._members.wait(push.connection, rank)
        return current

    def _is_complete(self, current: AggregationRound) -> bool:
        return not self._members.expected and self._members.active() <= current.pushes.keys()

    def _close(self, optimizer_index: int, current: AggregationRound) -> None:
        assert self._state.spec is not None
        current.mean, current.views = allocate_flat(self._state.spec.optimizers[optimizer_index].parameters)
        current.average()
        self._changed.notify_all()

    def _finish(self, optimizer_index: int, current: AggregationRound, factor: float) -> None:
        """Makes the step of a closed round with ``factor`` times the mean gradient, and opens the next round.

        Args:
            optimizer_index: the index of the optimizer.
            current: the round; the method does nothing if another thread has made its step.
            factor: the factor of the mean gradient; a negative factor skips the step.
        """
        if current is not self._rounds[optimizer_index] or current.mean is None:
            # Another worker's thread has made the step, or the round is open again.
            return
        pushes = current.pushes
        is_skipped = factor < 0 or any(push.buffers.is_skipped for push in pushes.values())
        if not is_skipped and factor != 1:
            torch._foreach_mul_(current.mean, factor)
        present = [any(entries) for entries in zip(*(push.buffers.present for push in pushes.values()), strict=True)]
        counted = [push for rank, push in pushes.items() if self._state.workers[rank] is push.worker]
        self._rounds[optimizer_index] = AggregationRound()
        try:
            update = self._make_update(pushes[min(pushes)], is_skipped, present, counted)
            self._apply(update, current.mean, current.views)
            self._latest[optimizer_index] = current
        except Exception as error:
            # The threads of the other workers raise the error too.
            current.error = error
            self._changed.notify_all()
            raise
        finally:
            # The norm and the error are read later; the tensors are as large as the model.
            current.mean, current.views, current.pushes = None, [], {}

    def _make_update(self, first: Push, is_skipped: bool, present: list[bool], counted: list[Push]) -> Update:
        workers = self._state.workers
        masks = [push.masks for push in counted if push.masks is not None]
        return Update(
            first.optimizer_index,
            is_skipped,
            first.buffers.hyperparameters,
            present,
            {
                push.rank: CountedPush(workers[push.rank].incarnation, push.push_seq, workers[push.rank].clock_offset)
                for push in counted
            },
            max(masks, key=lambda masks: masks.number, default=None),
        )

    def _apply(self, update: Update, flats: list[Tensor], views: list[Tensor]) -> None:
        self._state.update(update, flats, views)
        self._changed.notify_all()


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
