"""A parameter server: keeps a part of the parameters, steps along what workers push, and outlives their faults."""

from __future__ import annotations

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
from lightkit.parameter_server.door import Knock, Listener
from lightkit.parameter_server.inbox import Inbox, Round, Worker
from lightkit.parameter_server.job import Job, allocate
from lightkit.parameter_server.journal import Journal, fill
from lightkit.parameter_server.link import Link, LinkError
from lightkit.parameter_server.protocol import PUSH_FACTS, Answer, Request, bulk
from lightkit.parameter_server.shard import Shard

_log = logging.getLogger(__name__)

# Seconds for worker 0 to come, which the others wait for: it may be started by hand.
_BEGIN = 600.0


class Server:
    """Serves one job, in threads: one for each worker.

    Args:
        host: address of this machine that the workers reach; ``127.0.0.1`` serves those on this machine alone.
        port: 0 for any free one; see ``listener.port``.
        secret: that workers must know.
        directory: for what it needs to come back after its end, and where it looks for that; None for neither.
        timeout: seconds without a sign of life after which a worker counts as gone. One whose process ends is
            noticed at once.

    Raises:
        ConfigError: the address cannot be listened on.
        CheckpointError: what the directory holds is damaged.
        OSError: the directory cannot be written.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, secret: str = "", directory: Any = None, timeout: float = 30.0
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ConfigError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self.listener = Listener(host, port, secret)
        self._journal = Journal(Path(directory)) if directory is not None else None
        self._timeout = timeout
        # Of all that follows; notified at each change.
        self._changed = threading.Condition()
        self._job: Job | None = None
        self._options: list[list[dict[str, Any]]] = []
        self._shards: list[Shard] = []
        self._versions: list[int] = []
        self._rounds: list[Round] = []
        self._workers: dict[int, Worker] = {}
        self._links: dict[int, Link] = {}
        # Those that have been told of and did not come yet, and until when they are waited for.
        self._awaited: set[int] = set()
        self._awaited_until = math.inf
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._left_alone_since = time.monotonic()
        self._updates = 0
        self._stopped = threading.Event()
        if self._journal is not None and (snapshot := self._journal.load()) is not None:
            self._recover(snapshot)

    # What the process does.

    def run(self) -> None:
        """Serves until all workers have left.

        Raises:
            LightkitError: they were all lost, and none came back.
        """
        while not self._stopped.is_set() and not self._is_over():
            if (knock := self.listener.accept(0.2)) is not None:
                threading.Thread(target=self._serve, args=(knock,), daemon=True).start()
            self._look_for_the_lost()
        if self._journal is not None and not self._stopped.is_set():
            self._journal.clear()

    def stop(self) -> None:
        """Has `run` return soon, in whatever thread that is; what is needed to come back stays."""
        self._stopped.set()

    def _is_over(self) -> bool:
        with self._changed:
            if self._links or self._awaited or not self._workers:
                return False
            if any(worker.left for worker in self._workers.values()):
                return True
            # Others may come, or those that were lost come back.
            if time.monotonic() - self._left_alone_since > self._timeout:
                raise LightkitError(f"all workers are gone, and none came for {self._timeout:g} s")
            return False

    def _look_for_the_lost(self) -> None:
        with self._changed:
            ranks = list(self._links)
        signs = {rank: self.listener.signs_of_life(rank) for rank in ranks}
        now = time.monotonic()
        with self._changed:
            for rank, sign in signs.items():
                if (link := self._links.get(rank)) is None:
                    continue
                since = now
                if self._signs.get(rank, (b"", 0.0))[0] == sign:
                    since = self._signs[rank][1]
                self._signs[rank] = (sign, since)
                if now - since > self._timeout:
                    _log.warning("worker %d gave no sign of life for %g s: going on without it", rank, self._timeout)
                    self._remove(rank, link)
            if self._awaited and now > self._awaited_until:
                _log.warning("going on without %s, which did not come", _workers_named(self._awaited))
                self._awaited.clear()
                self._changed.notify_all()

    # Workers come and go.

    def _serve(self, knock: Knock) -> None:
        try:
            link, who = self.listener.connect(knock)
        except LinkError as error:
            _log.warning("%s", error)
            return
        # It is seen to be lost by other means.
        link.wait_for_at_most(365 * 86400.0)
        rank = -1
        try:
            link.heartbeat = min(self._timeout, float(who["timeout"])) / 5
            rank, worker = self._join(link, who)
            inboxes: dict[int, Inbox] = {}
            while self._answer(link, rank, worker, inboxes):
                pass
        except LinkError as error:
            if rank >= 0 and not worker.finished:
                _log.warning("worker %d is gone: %s", rank, error)
        except Exception as error:
            # Also the optimizer's: whatever it is, the worker is told.
            if not isinstance(error, LightkitError):
                _log.exception("a request of worker %d", rank)
            _refuse(link, error)
        finally:
            with self._changed:
                self._remove(rank, link)
            link.close()

    def _join(self, link: Link, who: dict[str, Any]) -> tuple[int, Worker]:
        rank, job = int(who["rank"]), Job.from_json(who["job"])
        with self._changed:
            # The first worker brings the parameters.
            until = time.monotonic() + _BEGIN
            while self._job is None and rank != 0:
                self._wait(link)
                if time.monotonic() > until:
                    raise LightkitError(f"worker 0, which brings the parameters, did not come in {_BEGIN:g} s")
            if self._job is not None and (difference := self._job.difference(job)) is not None:
                raise LightkitError(difference)
            known = self._workers.get(rank)
            if known is None or known.incarnation != who["incarnation"]:
                if rank in self._links:
                    raise LightkitError(
                        f"there is a worker {rank} already; who takes its place must wait until it is gone"
                    )
                tables = range(len(job.tables))
                slowest = [min((self._progress(r, t) for r in self._active()), default=0) for t in tables]
                known = Worker(who["incarnation"], [0 for _ in tables], slowest)
                for current in self._rounds:
                    if current.mean is None:
                        # What was pushed by who had the place before.
                        current.pushes.pop(rank, None)
                if self._job is not None:
                    self._workers[rank] = known
            self._links[rank] = link
            self._signs[rank] = (b"", time.monotonic())
            self._awaited.discard(rank)
            self._changed.notify_all()
            begun = self._job is not None
        link.send_header(Answer.OK)
        link.send_message({"begun": begun, "pushes": known.pushes, "timeout": self._timeout})
        return rank, known

    def _remove(self, rank: int, link: Link) -> None:
        if self._links.get(rank) is not link:
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

    def _wait(self, link: Link, rank: int | None = None) -> None:
        """Waits for a change; the worker hears that this is not the end.

        Raises:
            LinkError: the worker is gone, or has come by another way, if it has a rank yet.
        """
        if not self._changed.wait(link.heartbeat):
            self._changed.release()
            try:
                link.send_header(Answer.WAIT)
            finally:
                self._changed.acquire()
        if rank is not None and self._links.get(rank) is not link:
            raise LinkError("it had been given up, or has connected anew")

    # Requests.

    def _answer(self, link: Link, rank: int, worker: Worker, inboxes: dict[int, Inbox]) -> bool:
        request, table, number, version = link.receive_header()
        if self._links.get(rank) is not link:
            raise LinkError("it had been given up, or has connected anew")
        if request == Request.BEGIN:
            self._begin(link, rank, worker)
            return True
        if self._job is None:
            raise LightkitError("the job has not begun")
        if not 0 <= table < len(self._shards):
            raise LightkitError(f"there is no optimizer {table}")
        if table not in inboxes:
            inboxes[table] = Inbox(self._job, table, self._shards[table].count_numbers())
        inbox = inboxes[table]
        if request == Request.PUSH:
            inbox.receive(link)
            if self._job.mode == "sync":
                self._push_with_all(link, rank, worker, table, number, version, inbox)
            else:
                self._push_alone(link, rank, worker, table, number, inbox)
        if request in (Request.PUSH, Request.PULL):
            with self._changed:
                for copy, flat in zip(inbox.reply, self._shards[table].flats, strict=True):
                    copy.copy_(flat)
                version = self._versions[table]
            inbox.expect(link)
            link.expect_header()
            link.send_header(Answer.OK, version)
            link.send(*inbox.reply, tag=bulk(table))
        elif request == Request.STATE:
            with self._changed:
                state = [
                    {**shard.snapshot(), "version": v} for shard, v in zip(self._shards, self._versions, strict=True)
                ]
            link.send_header(Answer.OK)
            link.send_message(state)
        elif request == Request.FINISH:
            self._finish(link, rank, worker)
            link.send_header(Answer.OK)
        elif request == Request.LEAVE:
            with self._changed:
                worker.finished = worker.left = True
        else:
            raise LightkitError(f"there is no request {request}")
        return request != Request.LEAVE

    def _begin(self, link: Link, rank: int, worker: Worker) -> None:
        """Takes the job, the parameters and the optimizers' state from the first worker."""
        start = link.receive_message()
        job = Job.from_json(start["job"])
        with self._changed:
            if self._job is not None:
                raise LightkitError("the job has begun already")
            self._set_up(job, start["options"])
            for shard, values, state in zip(self._shards, start["values"], start["state"], strict=True):
                shard.load(values, state)
            self._job = job
            self._workers[rank] = worker
            self._awaited = set(range(job.workers)) - {rank}
            self._awaited_until = time.monotonic() + self._timeout
            if self._journal is not None and job.snapshot_every:
                self._journal.snapshot(self._snapshot())
            self._changed.notify_all()
        link.send_header(Answer.OK)

    def _set_up(self, job: Job, options: list[list[dict[str, Any]]]) -> None:
        shards = [Shard(table, groups) for table, groups in zip(job.tables, options, strict=True)]
        self._options, self._shards = options, shards
        self._versions = [0] * len(shards)
        self._rounds = [Round() for _ in shards]

    def _finish(self, link: Link, rank: int, worker: Worker) -> None:
        with self._changed:
            worker.finished = True
            self._changed.notify_all()
            while self._awaited or self._active():
                self._wait(link, rank)

    def _push_alone(self, link: Link, rank: int, worker: Worker, table: int, number: int, inbox: Inbox) -> None:
        """A step along the gradient of one worker."""
        with self._changed:
            # Pushed again because the answer was lost: it counts once.
            if number > worker.pushes[table]:
                self._update(table, inbox, inbox.flats, inbox.views, inbox.facts[0] != 0, {rank: number})
            if self._job.mode == "bounded":
                while self._is_too_far(rank, table):
                    self._wait(link, rank)

    def _is_too_far(self, rank: int, table: int) -> bool:
        slowest = min((self._progress(r, table) for r in self._active()), default=math.inf)
        return self._progress(rank, table) - slowest > self._job.staleness

    def _push_with_all(
        self, link: Link, rank: int, worker: Worker, table: int, number: int, version: int, inbox: Inbox
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
                self._wait(link, rank)
            if current is not self._rounds[table]:
                _raise(current.error)
                return
            if not current.needs_norm or rank not in current.pushes:
                self._step_with_all(table, current, 1.0)
                return
        # To all of them, also when the first has answered: they put the norm together from what all servers say.
        link.send_header(Answer.NORM)
        link.send(torch.tensor([current.norm], dtype=torch.float64))
        factor = torch.zeros(1, dtype=torch.float64)
        link.receive(factor)
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
        if self._journal is not None and self._job.snapshot_every:
            self._journal.append(update, flats)
        self._apply(update, views)
        self._updates += 1
        if self._journal is not None and self._job.snapshot_every:
            if self._updates % self._job.snapshot_every == 0 or self._journal.is_long:
                self._journal.snapshot(self._snapshot())
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

    def _snapshot(self) -> dict[str, Any]:
        return {
            "job": self._job.to_json(),
            "options": self._options,
            "shards": [shard.snapshot() for shard in self._shards],
            "versions": list(self._versions),
            "workers": {rank: asdict(worker) for rank, worker in self._workers.items()},
        }

    def _recover(self, snapshot: dict[str, Any]) -> None:
        job = Job.from_json(snapshot["job"])
        self._set_up(job, snapshot["options"])
        for shard, saved in zip(self._shards, snapshot["shards"], strict=True):
            shard.restore(saved)
        self._versions = list(snapshot["versions"])
        self._workers = {rank: Worker(**worker) for rank, worker in snapshot["workers"].items()}
        room = [allocate(table.parameters) for table in job.tables]
        replayed = 0
        for update, body in self._journal.replay():
            flats, views = room[update["table"]]
            try:
                fill(flats, body)
            except ValueError as error:
                raise CheckpointError(f"the log in {self._journal} does not fit its snapshot") from error
            self._apply(update, views)
            replayed += 1
        self._job = job
        self._awaited = {rank for rank, worker in self._workers.items() if not worker.finished}
        self._awaited_until = time.monotonic() + self._timeout
        _log.warning("recovered at versions %s, %d of them from the log", self._versions, replayed)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _workers_named(ranks: set[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + ", ".join(map(str, sorted(ranks)))


def _refuse(link: Link, error: Exception) -> None:
    try:
        link.send_header(Answer.REFUSED)
        link.send_message({"error": str(error) or type(error).__name__})
    except LinkError:
        pass
