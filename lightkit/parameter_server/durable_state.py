"""The durable state of a server, which survives its process: parameters, optimizers, and the counted pushes.

A push is counted when an update has used its gradient or has skipped it on purpose.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightkit.errors import CheckpointError
from lightkit.parameter_server.flat_tensors import allocate_flat
from lightkit.parameter_server.hyperparameters import GroupOptions
from lightkit.parameter_server.mask_update import MaskUpdate
from lightkit.parameter_server.shard import Shard
from lightkit.parameter_server.training_spec import TrainingSpec
from lightkit.parameter_server.write_ahead_log import WriteAheadLog, fill

_log = logging.getLogger(__name__)


@dataclass
class WorkerState:
    """The durable state of a worker.

    Args:
        incarnation: the random string of the worker's process.
        pushes: for each optimizer the sequence number of the worker's latest counted push; 0 before the first.
        clock_offset: for each optimizer the number that `clock` adds to ``pushes``, so that a worker that joins late
            starts level with the slowest worker.
        finished: True if the worker pushes no more.
        left: True if the worker has left after all workers had finished.
    """

    incarnation: str
    pushes: list[int]
    clock_offset: list[int]
    finished: bool = False
    left: bool = False

    def clock(self, optimizer_index: int) -> int:
        """Returns the worker's logical clock for an optimizer, as in stale synchronous parallel training.

        The clock is the sequence number of the latest counted push plus the clock offset.
        """
        return self.pushes[optimizer_index] + self.clock_offset[optimizer_index]

    # The JSON keys of the previous release: servers recover from its snapshots.

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "incarnation": self.incarnation,
            "pushes": self.pushes,
            "ahead": self.clock_offset,
            "finished": self.finished,
            "left": self.left,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> WorkerState:
        """Returns the state that `to_json` described.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is no such description.
        """
        fields = dict(value)
        return cls(clock_offset=fields.pop("ahead"), **fields)


class CountedPush(NamedTuple):
    """A push that an update counts, as the log has it.

    Args:
        incarnation: the random string of the worker's process.
        push_seq: the sequence number of the push.
        clock_offset: the worker's clock offset for each optimizer, which the snapshot lacks if the worker joined later.
    """

    incarnation: str
    push_seq: int
    clock_offset: list[int]


@dataclass(frozen=True)
class Update:
    """An update of an optimizer's parameters, as the log has it, without the gradient.

    Args:
        optimizer_index: the index of the optimizer.
        is_skipped: True if the optimizer makes no step although the pushes are counted.
        hyperparameters: the numbers among the options of the parameter groups, group by group.
        present: for each parameter True if the parameter has a gradient.
        pushes: the pushes that the gradient comes from, by the rank of the worker.
        masks: the masks of the parameters from this update on; None keeps those before.
    """

    optimizer_index: int
    is_skipped: bool
    hyperparameters: list[float]
    present: list[bool]
    pushes: dict[int, CountedPush]
    masks: MaskUpdate | None = None

    # The JSON keys of the previous release: servers replay its logs.

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "table": self.optimizer_index,
            "skip": self.is_skipped,
            "numbers": self.hyperparameters,
            "present": self.present,
            "pushes": {str(rank): list(push) for rank, push in self.pushes.items()},
            **({} if self.masks is None else {"masks": self.masks.to_json()}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Update:
        """Returns the update that `to_json` described.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is no such description.
        """
        pushes = {int(rank): CountedPush(*push) for rank, push in value["pushes"].items()}
        masks = MaskUpdate.from_json(value["masks"]) if "masks" in value else None
        return cls(value["table"], value["skip"], value["numbers"], value["present"], pushes, masks)


class DurableState:
    """The parameters, optimizers and counted pushes of a training on one server.

    The methods are not thread-safe: callers hold the lock of the training.

    Args:
        log: the write-ahead log; None for a server that does not recover.

    Attributes:
        spec: the specification of the training; None before the training has begun.
        shards: one shard for each optimizer.
        versions: for each optimizer the number of its updates so far.
        workers: the workers that have joined, by rank.
    """

    def __init__(self, log: WriteAheadLog | None) -> None:
        self.spec: TrainingSpec | None = None
        self.shards: list[Shard] = []
        self.versions: list[int] = []
        self.workers: dict[int, WorkerState] = {}
        self._write_ahead_log = log
        self._options: list[list[GroupOptions]] = []
        self._updates = 0

    def begin(self, spec: TrainingSpec, message: Mapping[str, Any], rank: int, worker: WorkerState) -> None:
        """Begins the training with the first worker's parameters and optimizer states.

        Args:
            spec: the specification of the training.
            message: the worker's message, whose entries ``options``, ``values`` and ``state`` have an element for each
                optimizer: see `lightkit.parameter_server.Client.start`.
            rank: the rank of the worker.
            worker: the state of the worker.

        Raises:
            KeyError, TypeError, AttributeError, ValueError: ``message`` has another form.
            ConfigError: the values do not fit the specification.
            OSError: the snapshot cannot be written; the training has not begun.
        """
        self._set_up(spec, message["options"])
        for shard, values, state in zip(self.shards, message["values"], message["state"], strict=True):
            shard.load(values, state)
        self.workers[rank] = worker
        if self._write_ahead_log is not None and spec.snapshot_every:
            try:
                self._write_ahead_log.snapshot(self._snapshot(spec))
            except OSError:
                del self.workers[rank]
                raise
        self.spec = spec

    def _set_up(self, spec: TrainingSpec, options: list[list[GroupOptions]]) -> None:
        shards = [Shard(optimizer, groups) for optimizer, groups in zip(spec.optimizers, options, strict=True)]
        self._options, self.shards = options, shards
        self.versions = [0] * len(shards)

    def update(self, update: Update, flats: list[Tensor], views: list[Tensor]) -> None:
        """Writes an update to the log and applies it.

        Args:
            update: the update.
            flats: the gradient of the update, one flat tensor for each dtype.
            views: the same gradient as views of ``flats``, one in the shape of each parameter.

        Raises:
            OSError: the log cannot be written; nothing has changed.
            Exception: the optimizer failed; the update is removed from the log.
        """
        assert self.spec is not None
        log = self._write_ahead_log if self.spec.snapshot_every > 0 else None
        if log is not None:
            log.append(update.to_json(), flats)
        try:
            self._apply(update, views)
        except Exception:
            if log is not None:
                # The update would fail again at each recovery, and the optimizer may have applied a part of it.
                log.snapshot(self._snapshot(self.spec))
            raise
        self._updates += 1
        if log is not None and (self._updates % self.spec.snapshot_every == 0 or log.is_long):
            log.snapshot(self._snapshot(self.spec))

    def _apply(self, update: Update, views: list[Tensor]) -> None:
        index = update.optimizer_index
        if not update.is_skipped:
            self.shards[index].step(views, update.present, update.hyperparameters)
        if update.masks is not None:
            self.shards[index].set_masks(update.masks)
        self.versions[index] += 1
        for rank, push in update.pushes.items():
            worker = self.workers.get(rank)
            if worker is None or worker.incarnation != push.incarnation:
                # A worker of the log that joined after the snapshot.
                worker = WorkerState(push.incarnation, [0] * len(self.shards), list(push.clock_offset))
                self.workers[rank] = worker
            worker.pushes[index] = push.push_seq

    def _snapshot(self, spec: TrainingSpec) -> dict[str, Any]:
        return {
            "job": spec.to_json(),
            "options": self._options,
            "shards": [shard.snapshot() for shard in self.shards],
            "versions": list(self.versions),
            "workers": {str(rank): worker.to_json() for rank, worker in self.workers.items()},
        }

    def recover(self) -> bool:
        """Restores the latest snapshot and applies the updates in the log after it.

        Returns:
            False if the server has no write-ahead log, or the log has no snapshot, so that nothing was restored.

        Raises:
            CheckpointError: the snapshot or the log is damaged, or a parameter server did not write it.
        """
        log = self._write_ahead_log
        if log is None or (snapshot := log.load()) is None:
            return False
        try:
            spec = TrainingSpec.from_json(snapshot["job"])
            self._set_up(spec, snapshot["options"])
            for shard, saved in zip(self.shards, snapshot["shards"], strict=True):
                shard.restore(saved)
            self.versions = [int(version) for version in snapshot["versions"]]
            self.workers = {int(rank): WorkerState.from_json(saved) for rank, saved in snapshot["workers"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the server cannot recover from the snapshot in {log}: {error}") from error
        buffers = [allocate_flat(optimizer.parameters) for optimizer in spec.optimizers]
        replayed = 0
        failure: Exception | None = None
        for value, body in log.replay():
            if failure is not None:
                raise CheckpointError(f"the server cannot apply update {replayed} of the log in {log}: {failure}")
            try:
                update = Update.from_json(value)
                flats, views = buffers[update.optimizer_index]
                fill(flats, body)
                self._apply(update, views)
                replayed += 1
            except Exception as error:
                failure = error
        if failure is not None:
            # The server ended after the failure of the last update, before a worker got the reply.
            _log.warning("the last update of the log in %s is left out: %s", log, failure)
            log.snapshot(self._snapshot(spec))
        self.spec = spec
        _log.warning("recovered at versions %s, %d of them from the log", self.versions, replayed)
        return True
