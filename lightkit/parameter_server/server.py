"""A parameter server: keeps a part of the parameters, steps along what workers push, and outlives their faults."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightkit.errors import CheckpointError, ConfigError, LightkitError
from lightkit.parameter_server.available_memory import check_memory
from lightkit.parameter_server.inbox import Inbox, Round, Worker
from lightkit.parameter_server.job import Job, allocate
from lightkit.parameter_server.protocol import PUSH_FACTS, Answer, Hello, Request
from lightkit.parameter_server.rendezvous import Listener
from lightkit.parameter_server.shard import Shard
from lightkit.parameter_server.transport import (
    Connection,
    ProtocolError,
    SilenceError,
    TransportError,
    heartbeat_of,
)
from lightkit.parameter_server.write_ahead_log import WriteAheadLog, fill

_log = logging.getLogger(__name__)

# Seconds for worker 0 to come, which the others wait for: it may be started by hand.
_BEGIN = 600.0

# Seconds for a worker that is refused to read why.
_LAST_WORDS = 1.0

# Connections of workers at a time, each of which has a thread; processes have about twice as many descriptors.
_MOST_SESSIONS = 512


class Server:
    """Serves one job, in threads: one for each worker.

    Args:
        host: address of this machine that the workers reach; ``127.0.0.1`` serves those on this machine alone.
        port: 0 for any free one; see ``listener.port``.
        secret: that workers must know.
        directory: for what it needs to come back after its end, and where it looks for that; None for neither.
        timeout: seconds without a sign of life after which a worker counts as gone. One whose process ends is
            noticed at once.
        recover_until_damage: where the log in the directory is damaged and updates follow the damage, goes on from the
            last update before it, and keeps the rest of the log under another name; else that is an error.

    Raises:
        ConfigError: the address cannot be listened on.
        CheckpointError: what the directory holds is damaged.
        OSError: the directory cannot be written.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: str = "",
        directory: Any = None,
        timeout: float = 30.0,
        recover_until_damage: bool = False,
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ConfigError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self.listener = Listener(host, port, secret, timeout)
        self._journal = WriteAheadLog(Path(directory), recover_until_damage) if directory is not None else None
        self._timeout = timeout
        # Of all that follows; notified at each change.
        self._changed = threading.Condition()
        self._job: Job | None = None
        self._options: list[list[dict[str, Any]]] = []
        self._shards: list[Shard] = []
        self._versions: list[int] = []
        self._rounds: list[Round] = []
        self._workers: dict[int, Worker] = {}
        self._links: dict[int, Connection] = {}
        # Those that have been told of and did not come yet, and until when they are waited for.
        self._awaited: set[int] = set()
        self._awaited_until = math.inf
        self._left_alone_since = time.monotonic()
        self._updates = 0
        self._stopped = threading.Event()
        self._sessions, self._counting = 0, threading.Lock()
        try:
            if self._journal is not None and (snapshot := self._journal.load()) is not None:
                self._recover(snapshot)
            # Nobody can connect to a server that does not know yet what it serves.
            self.listener.listen()
        except BaseException:
            self._close()
            raise

    # What the process does.

    def run(self) -> None:
        """Serves until all workers have left.

        Raises:
            LightkitError: they were all lost, and none came back.
        """
        try:
            while not self._stopped.is_set() and not self._is_over():
                if (connection := self.listener.accept(0.2)) is not None:
                    self._start_session(connection)
            if self._journal is not None and not self._stopped.is_set():
                self._journal.clear()
        finally:
            self._close()

    def _close(self) -> None:
        """Lets go of the port, the workers and the directory."""
        self.listener.close()
        with self._changed:
            for connection in self._links.values():
                connection.close()
            if self._journal is not None:
                self._journal.close()

    def stop(self) -> None:
        """Has `run` return soon, in whatever thread that is; what is needed to come back stays."""
        self._stopped.set()

    def _is_over(self) -> bool:
        # While a snapshot is written, connections are accepted all the same.
        if not self._changed.acquire(timeout=0.2):
            return False
        try:
            if self._awaited and time.monotonic() > self._awaited_until:
                _log.warning("going on without %s, which did not come", _workers_named(self._awaited))
                self._awaited.clear()
                self._changed.notify_all()
            if self._links or self._awaited or not self._workers:
                return False
            if any(worker.left for worker in self._workers.values()):
                return True
            # Others may come, or those that were lost come back.
            if time.monotonic() - self._left_alone_since > self._timeout:
                raise LightkitError(f"all workers are gone, and none came for {self._timeout:g} s")
            return False
        finally:
            self._changed.release()

    def _start_session(self, connection: Connection) -> None:
        with self._counting:
            if self._sessions >= _MOST_SESSIONS:
                _log.warning("a worker was sent away: the server has %d connections already", _MOST_SESSIONS)
                connection.release()
                return
            self._sessions += 1
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except RuntimeError as error:
            self._end_session(connection)
            _log.warning("a worker was sent away: %s", error)

    def _end_session(self, connection: Connection) -> None:
        connection.release()
        with self._counting:
            self._sessions -= 1

    # Workers come and go.

    def _serve(self, connection: Connection) -> None:
        rank, worker = -1, None
        try:
            hello = Hello.read(connection.receive_message())
            rank = hello.rank
            connection.heartbeat = heartbeat_of(min(self._timeout, hello.timeout))
            worker = self._join(connection, hello)
            inboxes: dict[int, Inbox] = {}
            while self._answer(connection, hello, worker, inboxes):
                pass
        except ProtocolError as error:
            _log.warning("worker %d is sent away: %s", rank, error)
            self._refuse(rank, connection, error)
        except SilenceError:
            if worker is not None and not worker.left:
                _log.warning("worker %d gave no sign of life for %g s: going on without it", rank, self._timeout)
        except TransportError as error:
            if worker is not None and not worker.finished:
                _log.warning("worker %d is gone: %s", rank, error)
        except Exception as error:
            # Also the optimizer's: whatever it is, the worker is told.
            if not isinstance(error, LightkitError):
                _log.exception("a request of worker %d", rank)
            self._refuse(rank, connection, error)
        finally:
            with self._changed:
                self._remove(rank, connection)
            self._end_session(connection)

    def _refuse(self, rank: int, connection: Connection, error: Exception) -> None:
        with self._changed:
            self._remove(rank, connection)
        with contextlib.suppress(TransportError):
            connection.send_header(Answer.REFUSED)
            connection.send_message({"error": str(error) or type(error).__name__})
            # It may be in the middle of what was wrong, and would not hear why.
            connection.release(_LAST_WORDS)

    def _join(self, connection: Connection, hello: Hello) -> Worker:
        rank, job = hello.rank, hello.job
        with self._changed:
            # The first worker brings the parameters.
            until = time.monotonic() + _BEGIN
            while self._job is None and rank != 0:
                self._wait(connection)
                if time.monotonic() > until:
                    raise LightkitError(f"worker 0, which brings the parameters, did not come in {_BEGIN:g} s")
            if self._job is not None and (difference := self._job.difference(job)) is not None:
                raise LightkitError(difference)
            known = self._workers.get(rank)
            if known is None or known.incarnation != hello.incarnation:
                if rank in self._links:
                    raise LightkitError(
                        f"there is a worker {rank} already; who takes its place must wait until it is gone"
                    )
                tables = range(len(job.tables))
                slowest = [min((self._progress(r, t) for r in self._active()), default=0) for t in tables]
                known = Worker(hello.incarnation, [0 for _ in tables], slowest)
                for current in self._rounds:
                    if current.mean is None:
                        # What was pushed by who had the place before.
                        current.pushes.pop(rank, None)
                if self._job is not None:
                    self._workers[rank] = known
            if (earlier := self._links.get(rank)) is not None:
                earlier.close()
            self._links[rank] = connection
            self._awaited.discard(rank)
            self._changed.notify_all()
            begun = self._job is not None
        connection.send_header(Answer.OK)
        connection.send_message({"begun": begun, "pushes": known.pushes, "timeout": self._timeout})
        return known

    def _remove(self, rank: int, connection: Connection) -> None:
        if self._links.get(rank) is not connection:
            return
        del self._links[rank]
        self._left_alone_since = time.monotonic()
        for round_ in self._rounds:
            # Nobody is left who would say how far to clip.
            if round_.mean is not None and not round_.pushes.keys() & self._links.keys():
                round_.mean = None
        self._changed.notify_all()

    def _active(self) -> set[int]:
        """The workers that push, those among them that are expected back."""
        return {r for r in self._links.keys() | self._awaited if r in self._workers and not self._workers[r].finished}

    def _progress(self, rank: int, table: int) -> int:
        worker = self._workers[rank]
        return worker.pushes[table] + worker.ahead[table]

    def _wait(self, connection: Connection, rank: int | None = None) -> None:
        """Waits for a change; the worker hears that this is not the end.

        Raises:
            TransportError: the worker is gone, or has come by another way, if it has a rank yet.
        """
        self._changed.wait(connection.heartbeat)
        # Also where changes come more often than that.
        if time.monotonic() - connection.last_sent >= connection.heartbeat:
            self._changed.release()
            try:
                connection.send_header(Answer.WAIT)
            finally:
                self._changed.acquire()
        connection.poll()
        if rank is not None and self._links.get(rank) is not connection:
            raise TransportError("it had been given up, or has connected anew")

    # Requests.

    def _answer(self, connection: Connection, hello: Hello, worker: Worker, inboxes: dict[int, Inbox]) -> bool:
        """Answers the next request; returns whether others may follow."""
        request, table, number, version = connection.receive_header()
        rank = hello.rank
        if self._links.get(rank) is not connection:
            raise TransportError("it had been given up, or has connected anew")
        if request == Request.BEGIN:
            self._begin(connection, hello, worker)
            return True
        if self._job is None:
            raise ProtocolError("the job has not begun")
        if request in (Request.PUSH, Request.PULL):
            if not 0 <= table < len(self._shards):
                raise ProtocolError(f"there is no optimizer {table}")
            if table not in inboxes:
                # Its gradients, what they are decoded from, and the reply.
                check_memory(3 * self._job.nbytes)
                inboxes[table] = Inbox(self._job, table, self._shards[table].count_numbers())
            inbox = inboxes[table]
            if request == Request.PUSH:
                if worker.finished:
                    raise ProtocolError("a push came from a worker that had said that it pushes no more")
                inbox.receive(connection)
                if self._job.mode == "sync":
                    self._push_with_all(connection, rank, worker, table, number, version, inbox)
                else:
                    self._push_alone(connection, rank, worker, table, number, inbox)
            with self._changed:
                for copy, flat in zip(inbox.reply, self._shards[table].flats, strict=True):
                    copy.copy_(flat)
                version = self._versions[table]
            connection.send_header(Answer.OK, version)
            connection.send(*inbox.reply)
        elif request == Request.STATE:
            check_memory(2 * self._job.nbytes)
            with self._changed:
                state = [
                    {**shard.snapshot(), "version": v} for shard, v in zip(self._shards, self._versions, strict=True)
                ]
            connection.send_header(Answer.OK)
            connection.send_message(state)
        elif request == Request.FINISH:
            self._finish(connection, rank, worker)
            connection.send_header(Answer.OK)
        elif request == Request.LEAVE:
            with self._changed:
                # Who leaves in the middle is lost: that is not the end of the job.
                worker.left = worker.finished
        else:
            raise ProtocolError(f"there is no request {request}")
        return request != Request.LEAVE

    def _begin(self, connection: Connection, hello: Hello, worker: Worker) -> None:
        """Takes the job, the parameters and the optimizers' state from the first worker."""
        check_memory(2 * hello.job.nbytes)
        start = connection.receive_message(hello.job.most_bytes)
        with self._changed:
            if self._job is not None:
                raise ProtocolError("the job has begun already")
            try:
                job = Job.from_json(start["job"])
                if (difference := hello.job.difference(job)) is not None:
                    raise ProtocolError(difference)
                self._set_up(job, start["options"])
                for shard, values, state in zip(self._shards, start["values"], start["state"], strict=True):
                    shard.load(values, state)
            except (KeyError, TypeError, AttributeError) as error:
                raise ProtocolError(f"the job cannot begin: {error}") from None
            self._workers[hello.rank] = worker
            if self._journal is not None and job.snapshot_every:
                try:
                    self._journal.snapshot(self._snapshot(job))
                except OSError:
                    # The job has not begun.
                    del self._workers[hello.rank]
                    raise
            self._job = job
            self._awaited = set(range(job.workers)) - {hello.rank}
            self._awaited_until = time.monotonic() + self._timeout
            self._changed.notify_all()
        connection.send_header(Answer.OK)

    def _set_up(self, job: Job, options: list[list[dict[str, Any]]]) -> None:
        shards = [Shard(table, groups) for table, groups in zip(job.tables, options, strict=True)]
        self._options, self._shards = options, shards
        self._versions = [0] * len(shards)
        self._rounds = [Round() for _ in shards]

    def _finish(self, connection: Connection, rank: int, worker: Worker) -> None:
        with self._changed:
            worker.finished = True
            self._changed.notify_all()
            while self._awaited or self._active():
                self._wait(connection, rank)

    def _push_alone(
        self, connection: Connection, rank: int, worker: Worker, table: int, number: int, inbox: Inbox
    ) -> None:
        """A step along the gradient of one worker."""
        with self._changed:
            # Pushed again because the answer was lost: it counts once.
            if number > worker.pushes[table]:
                self._update(table, inbox, inbox.flats, inbox.views, inbox.facts[0] != 0, {rank: number})
            if self._job.mode == "bounded":
                while self._is_too_far(rank, table):
                    self._wait(connection, rank)

    def _is_too_far(self, rank: int, table: int) -> bool:
        slowest = min((self._progress(r, table) for r in self._active()), default=math.inf)
        return self._progress(rank, table) - slowest > self._job.staleness

    def _push_with_all(
        self, connection: Connection, rank: int, worker: Worker, table: int, number: int, version: int, inbox: Inbox
    ) -> None:
        """A step along the mean of all workers' gradients."""
        with self._changed:
            if number <= worker.pushes[table]:
                return
            if version < self._versions[table]:
                # The others have taken this step without it: what it computed is of parameters that are gone.
                worker.pushes[table] = number
                return
            current = self._rounds[table]
            while current is self._rounds[table]:
                if current.mean is None and current.pushes.get(rank, (None,))[0] is not inbox:
                    current.pushes[rank] = (inbox, number, worker)
                    self._changed.notify_all()
                if current.mean is None and self._is_complete(current):
                    self._average(table, current)
                    self._changed.notify_all()
                if current.mean is not None and rank in current.pushes:
                    break
                self._wait(connection, rank)
            if current is not self._rounds[table]:
                _raise(current.error)
                return
            if not current.needs_norm or rank not in current.pushes:
                self._step_with_all(table, current, 1.0)
                return
        # To all of them, also when the first has answered: they put the norm together from what all servers say.
        connection.send_header(Answer.NORM)
        connection.send(torch.tensor([current.norm], dtype=torch.float64))
        factor = torch.zeros(1, dtype=torch.float64)
        connection.receive(factor)
        with self._changed:
            # All workers come to the same factor.
            self._step_with_all(table, current, factor.item())
            _raise(current.error)

    def _is_complete(self, current: Round) -> bool:
        return not self._awaited and self._active() <= current.pushes.keys()

    def _average(self, table: int, current: Round) -> None:
        pushes = [current.pushes[rank][0] for rank in sorted(current.pushes)]
        current.mean, current.views = allocate(self._job.tables[table].parameters)
        for push in pushes:
            for mean, flat in zip(current.mean, push.flats, strict=True):
                mean.add_(flat, alpha=1 / len(pushes))
        clamps = [bound for push in pushes if (bound := push.facts[1].item()) > 0]
        if clamps:
            for mean in current.mean:
                mean.clamp_(-min(clamps), min(clamps))
        current.needs_norm = any(push.facts[2] != 0 for push in pushes)
        norms = torch._foreach_norm(current.views) if current.views else []
        current.norm = math.fsum(norm.double().item() ** 2 for norm in norms)

    def _step_with_all(self, table: int, current: Round, factor: float) -> None:
        if current is not self._rounds[table] or current.mean is None:
            # Somebody else has made it, or it must be made anew.
            return
        skip = factor < 0 or any(push.facts[0] != 0 for push, _, _ in current.pushes.values())
        if not skip and factor != 1:
            torch._foreach_mul_(current.mean, factor)
        first = current.pushes[min(current.pushes)][0]
        present = [any(there) for there in zip(*(push.present for push, _, _ in current.pushes.values()), strict=True)]
        first.facts[PUSH_FACTS + len(first.numbers) :] = torch.tensor(present, dtype=torch.float64)
        numbers = {r: number for r, (_, number, worker) in current.pushes.items() if self._workers[r] is worker}
        self._rounds[table] = Round()
        try:
            self._update(table, first, current.mean, current.views, skip, numbers)
        except Exception as error:
            # To be told to all of them.
            current.error = error
            self._changed.notify_all()
            raise

    def _update(
        self, table: int, push: Inbox, flats: list[Tensor], views: list[Tensor], skip: bool, numbers: dict[int, int]
    ) -> None:
        """Logs an update, makes it, and counts the pushes that it comes from."""
        update = {
            "table": table,
            "skip": bool(skip),
            "numbers": push.numbers,
            "present": push.present,
            "pushes": {
                str(rank): [self._workers[rank].incarnation, number, self._workers[rank].ahead]
                for rank, number in numbers.items()
            },
        }
        is_logged = self._journal is not None and self._job.snapshot_every > 0
        if is_logged:
            self._journal.append(update, flats)
        try:
            self._apply(update, views)
        except Exception:
            if is_logged:
                # It would fail again whenever the server comes back, and a part of it has been made.
                self._journal.snapshot(self._snapshot(self._job))
            raise
        self._updates += 1
        if is_logged and (self._updates % self._job.snapshot_every == 0 or self._journal.is_long):
            self._journal.snapshot(self._snapshot(self._job))
        self._changed.notify_all()

    def _apply(self, update: dict[str, Any], views: list[Tensor]) -> None:
        table = update["table"]
        if not update["skip"]:
            self._shards[table].step(views, update["present"], update["numbers"])
        self._versions[table] += 1
        for rank, (incarnation, number, ahead) in update["pushes"].items():
            worker = self._workers.get(int(rank))
            if worker is None or worker.incarnation != incarnation:
                # In the log: it came after the snapshot.
                worker = self._workers[int(rank)] = Worker(incarnation, [0] * len(self._shards), list(ahead))
            worker.pushes[table] = number

    # What outlives the process.

    def _snapshot(self, job: Job) -> dict[str, Any]:
        return {
            "job": job.to_json(),
            "options": self._options,
            "shards": [shard.snapshot() for shard in self._shards],
            "versions": list(self._versions),
            "workers": {str(rank): asdict(worker) for rank, worker in self._workers.items()},
        }

    def _recover(self, snapshot: Any) -> None:
        try:
            job = Job.from_json(snapshot["job"])
            self._set_up(job, snapshot["options"])
            for shard, saved in zip(self._shards, snapshot["shards"], strict=True):
                shard.restore(saved)
            self._versions = [int(version) for version in snapshot["versions"]]
            self._workers = {int(rank): Worker(**worker) for rank, worker in snapshot["workers"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the snapshot in {self._journal} cannot be taken up: {error}") from error
        room = [allocate(table.parameters) for table in job.tables]
        replayed, failed = 0, None
        for update, body in self._journal.replay():
            if failed is not None:
                raise CheckpointError(f"update {replayed} of the log in {self._journal} cannot be made: {failed}")
            try:
                flats, views = room[update["table"]]
                fill(flats, body)
                self._apply(update, views)
                replayed += 1
            except Exception as error:
                failed = error
        if failed is not None:
            # The server ended when it had failed, before any worker heard of it.
            _log.warning("the last update of the log in %s is left out: %s", self._journal, failed)
            self._journal.snapshot(self._snapshot(job))
        self._job = job
        self._awaited = {rank for rank, worker in self._workers.items() if not worker.finished}
        self._awaited_until = time.monotonic() + self._timeout
        _log.warning("recovered at versions %s, %d of them from the log", self._versions, replayed)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _workers_named(ranks: set[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + ", ".join(map(str, sorted(ranks)))
