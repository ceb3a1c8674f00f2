"""Gathers waiting requests into batches for the workers, limits their number and time, and restarts lost workers."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lightkit.app.serving.messages import Reply, Request, RequestError
from lightkit.app.serving.settings import ServerSettings
from lightkit.app.serving.workers import Worker, WorkerLost
from lightkit.errors import LightkitError

# The seconds between two attempts to restart a worker: the first, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0

_STOPPING = "the server stops"


@dataclass(frozen=True)
class _Waiting:
    """A request and the future of its reply.

    Attributes:
        request: the request.
        reply: the future, which is done if nobody waits for the reply any more.
        arrival: the time of the event loop at which the request came.
    """

    request: Request
    reply: asyncio.Future[Reply]
    arrival: float


class Dispatcher:
    """Distributes requests to workers.

    A worker that is free takes what waits, up to a batch. Each reply goes to its client as soon as it is there.

    Args:
        settings: the settings of the server.
        is_batched: True if one call of the model answers several requests. Else a worker gets them one by one, so
            that another worker can take the next.
    """

    def __init__(self, settings: ServerSettings, is_batched: bool) -> None:
        self._settings = settings
        self._max_batch_size = settings.max_batch_size if is_batched else 1
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._futures: set[asyncio.Future[Reply]] = set()
        self._is_closed = False
        self._held = 0
        self._ready = 0

    @property
    def is_ready(self) -> bool:
        """True if a worker answers requests or is free to do so."""
        return self._ready > 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place for a request, from before its body is read until its reply is sent.

        Raises:
            RequestError: with the status 503, if all places are taken.
        """
        if self._is_closed:
            raise RequestError(503, _STOPPING)
        if self._held >= self._settings.max_waiting:
            raise RequestError(503, f"{self._held} requests wait already, which is the limit: try again later")
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def submit(self, request: Request) -> Reply:
        """Returns the reply to a request.

        Raises:
            RequestError: with the status 504, if there is no reply in time.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, loop.create_future(), loop.time())
        self._futures.add(waiting.reply)
        self._queue.append(waiting)
        self._arrived.set()
        try:
            return await asyncio.wait_for(waiting.reply, self._settings.timeout)
        except asyncio.TimeoutError as error:
            raise RequestError(504, f"there is no answer after {self._settings.timeout:g} seconds") from error
        finally:
            self._futures.discard(waiting.reply)

    def close(self) -> None:
        """Answers all requests, and those to come, with the status 503, since the server stops."""
        self._is_closed = True
        for future in self._futures:
            if not future.done():
                future.set_result(Reply.error(503, _STOPPING))

    async def run(self, worker: Worker) -> None:
        """Has a started worker answer requests, and starts it again whenever it is lost; runs until it is cancelled."""
        while True:
            self._ready += 1
            try:
                while True:
                    await self._answer(worker, await self._batch_for(worker))
            except WorkerLost as error:
                print(f"warning: {error}; it starts again", file=sys.stderr, flush=True)
            finally:
                self._ready -= 1
            await worker.end()
            await _restart(worker)

    async def _batch_for(self, worker: Worker) -> list[_Waiting]:
        """Waits for the next batch of a worker.

        Raises:
            WorkerLost: the worker has ended meanwhile.
        """
        assert worker.lost is not None
        task = asyncio.create_task(self._next_batch())
        try:
            await asyncio.wait({task, worker.lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if not worker.lost.done():
            return task.result()
        if task.done():
            # Another worker takes these, or this one after its start.
            self._queue.extendleft(reversed(task.result()))
            self._arrived.set()
        raise await worker.loss()

    async def _next_batch(self) -> list[_Waiting]:
        """Waits for requests and takes those of a batch, at least one."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                await self._arrival()
            end = self._queue[0].arrival + self._settings.batch_timeout
            while 0 < len(self._queue) < self._max_batch_size and (left := end - loop.time()) > 0:
                try:
                    await asyncio.wait_for(self._arrival(), left)
                except asyncio.TimeoutError:
                    break
            batch: list[_Waiting] = []
            while self._queue and len(batch) < self._max_batch_size:
                waiting = self._queue.popleft()
                if not waiting.reply.done():
                    batch.append(waiting)
            if batch:
                # Another worker may be free for the rest.
                self._arrived.set()
                return batch

    async def _arrival(self) -> None:
        """Waits until a request has come since the previous look at the queue."""
        self._arrived.clear()
        await self._arrived.wait()

    async def _answer(self, worker: Worker, batch: Sequence[_Waiting]) -> None:
        """Has a worker answer a batch.

        Raises:
            WorkerLost: the worker has ended, or was ended since it took too long.
        """

        def reply(index: int, answer: Reply) -> None:
            if not batch[index].reply.done():
                batch[index].reply.set_result(answer)

        # A worker that computes for longer would let all later requests wait for nothing.
        limit = self._settings.timeout if worker.can_be_killed else None
        try:
            await asyncio.wait_for(worker.answer([waiting.request for waiting in batch], reply), limit)
        except asyncio.TimeoutError as error:
            raise WorkerLost(f"{worker.name} has computed for {self._settings.timeout:g} seconds") from error
        finally:
            for index in range(len(batch)):
                reply(index, Reply.error(500, "the worker has ended while it computed this answer"))


async def _restart(worker: Worker) -> None:
    """Starts a worker again, and again after an error, until it runs."""
    pause = _FIRST_PAUSE
    while True:
        await asyncio.sleep(pause)
        try:
            await worker.start()
            return
        except (LightkitError, OSError) as error:
            pause = min(2 * pause, _LONGEST_PAUSE)
            print(f"warning: {error}; next attempt in {pause:g} seconds", file=sys.stderr, flush=True)
