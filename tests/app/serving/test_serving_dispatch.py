"""Requests wait, become batches and get their replies, whatever happens to the workers."""

from __future__ import annotations

import asyncio
import socket

import pytest

from lightkit.app.serving.dispatch import Dispatcher
from lightkit.app.serving.messages import Reply, Request, RequestError
from lightkit.app.serving.settings import ServerSettings
from lightkit.app.serving.workers import Worker, WorkerLost
from lightkit.errors import CheckpointError


class Recorder(Worker):
    """A worker in the event loop that records its batches, and can be held, lost and restarted."""

    name = "the recorder"
    can_be_killed = True

    def __init__(self):
        super().__init__()
        self.batches = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_lost = False
        self.starts = []
        self.lost = asyncio.get_running_loop().create_future()

    async def start(self):
        self.starts.append(self.is_lost)
        if len(self.starts) == 1:
            raise CheckpointError("the file is gone")
        self.is_lost = False
        self.lost = asyncio.get_running_loop().create_future()
        return {}

    async def answer(self, requests, reply):
        self.batches.append([request.body for request in requests])
        await self.gate.wait()
        if self.is_lost:
            raise WorkerLost("the recorder is lost")
        for index, request in enumerate(requests):
            reply(index, Reply(200, request.body))

    async def end(self):
        pass

    async def loss(self):
        return WorkerLost("the recorder is lost")

    def _launch(self, connection: socket.socket):
        raise NotImplementedError

    def _join(self):
        raise NotImplementedError


def run(scenario, is_batched=True, count=1, **settings):
    """Runs ``scenario(dispatcher, workers)`` with running workers."""

    async def main():
        dispatcher = Dispatcher(ServerSettings(**settings), is_batched)
        workers = [Recorder() for _ in range(count)]
        tasks = [asyncio.create_task(dispatcher.run(worker)) for worker in workers]
        await asyncio.sleep(0)
        try:
            return await asyncio.wait_for(scenario(dispatcher, workers), 20)
        finally:
            for task in tasks:
                task.cancel()

    return asyncio.run(main())


async def submit(dispatcher, *bodies):
    return await asyncio.gather(*(dispatcher.submit(Request(body)) for body in bodies), return_exceptions=True)


def test_what_waits_becomes_batches():
    """A free worker takes one request at once, and then all that came meanwhile, up to a batch."""

    async def scenario(dispatcher, workers):
        workers[0].gate.clear()
        first = asyncio.create_task(submit(dispatcher, b"0"))
        await asyncio.sleep(0.01)
        rest = asyncio.create_task(submit(dispatcher, *(bytes([65 + n]) for n in range(5))))
        await asyncio.sleep(0.01)
        workers[0].gate.set()
        assert [reply.body for reply in await first + await rest] == [b"0", b"A", b"B", b"C", b"D", b"E"]
        assert workers[0].batches == [[b"0"], [b"A", b"B", b"C"], [b"D", b"E"]]

    run(scenario, max_batch_size=3)


def test_a_batch_is_waited_for():
    """With batch_timeout a worker takes a full batch at once, and a part of one after the time."""

    async def scenario(dispatcher, workers):
        await submit(dispatcher, b"a", b"b")
        begin = asyncio.get_running_loop().time()
        later = asyncio.create_task(submit(dispatcher, b"c"))
        await asyncio.sleep(0.05)
        assert workers[0].batches == [[b"a", b"b"]]
        await later
        assert asyncio.get_running_loop().time() - begin >= 0.2
        assert workers[0].batches[1:] == [[b"c"]]

    run(scenario, max_batch_size=2, batch_timeout=0.2)


def test_texts_go_one_by_one_to_free_workers():
    """A kind that is not batched leaves the next request to another worker."""

    async def scenario(dispatcher, workers):
        for worker in workers:
            worker.gate.clear()
        waiting = asyncio.create_task(submit(dispatcher, b"a", b"b", b"c"))
        await asyncio.sleep(0.01)
        assert sorted(batch for worker in workers for batch in worker.batches) == [[b"a"], [b"b"]]
        for worker in workers:
            worker.gate.set()
        await waiting

    run(scenario, is_batched=False, count=2)


def test_the_number_of_requests_is_limited():
    """A request beyond the limit gets 503 at once, and a place is free again after an answer."""

    async def scenario(dispatcher, workers):
        with dispatcher.place(), dispatcher.place():
            with pytest.raises(RequestError, match="2 requests wait already") as error, dispatcher.place():
                pass
            assert error.value.status == 503
        with dispatcher.place():
            pass

    run(scenario, max_waiting=2)


def test_a_late_answer_is_504_and_the_worker_starts_again():
    """A worker that takes too long is ended; requests get an error, and the next ones an answer."""

    async def scenario(dispatcher, workers):
        workers[0].gate.clear()
        late, waiting = await submit(dispatcher, b"late", b"waiting")
        assert late.status == waiting.status == 504
        while not dispatcher.is_ready:
            await asyncio.sleep(0.05)
        workers[0].gate.set()
        # The request that nobody waits for any more is not computed.
        assert [reply.body for reply in await submit(dispatcher, b"next")] == [b"next"]
        assert workers[0].batches == [[b"late"], [b"next"]]

    run(scenario, max_batch_size=1, timeout=0.1)


def test_a_lost_worker_costs_its_batch_alone(capsys):
    """Requests of the batch get 500, a worker that cannot start is tried again, and later requests are answered."""

    async def scenario(dispatcher, workers):
        workers[0].is_lost = True
        (lost,) = await submit(dispatcher, b"poison")
        assert lost.status == 500 and b"the worker has ended" in lost.body
        assert not dispatcher.is_ready
        assert [reply.body for reply in await submit(dispatcher, b"next")] == [b"next"]
        assert len(workers[0].starts) == 2 and dispatcher.is_ready

    run(scenario)
    err = capsys.readouterr().err
    assert "warning: the recorder is lost; it starts again" in err
    assert "warning: the file is gone; next attempt in 1 seconds" in err


def test_an_idle_worker_that_ends_starts_again():
    """A worker that ends between two requests costs no request."""

    async def scenario(dispatcher, workers):
        workers[0].lost.set_result(None)
        while dispatcher.is_ready:
            await asyncio.sleep(0.01)
        assert [reply.body for reply in await submit(dispatcher, b"next")] == [b"next"]
        assert len(workers[0].starts) == 2

    run(scenario)
