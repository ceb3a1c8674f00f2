"""The status of a server, for monitoring and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerStatus:
    """The status of a worker at one moment.

    Args:
        pushes: for each optimizer the sequence number of the worker's latest push that an update has counted.
        has_finished: True if the worker pushes no more.
        pending: the indices of the optimizers whose next step in ``sync`` has a push of this worker's connection.
    """

    pushes: tuple[int, ...]
    has_finished: bool
    pending: frozenset[int]


@dataclass(frozen=True)
class ServerStatus:
    """The status of a server at one moment.

    Args:
        versions: for each optimizer the number of its updates; empty before the training has begun.
        workers: the workers that have joined, by rank.
        connected: the ranks of the workers with a connection.
        expected: the ranks of the workers that have not joined yet, and that the first steps wait for.
        sessions: the number of connections, with those of peers that have not joined.
        joins: the number of times that a worker has joined since the start of the server, reconnections included.
    """

    versions: tuple[int, ...]
    workers: Mapping[int, WorkerStatus]
    connected: frozenset[int]
    expected: frozenset[int]
    sessions: int
    joins: int
