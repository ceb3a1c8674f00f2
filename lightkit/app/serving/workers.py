"""The server's side of a worker: a process with a model restored from files, or a thread with a model of the caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from lightkit.app.serving.answering import answer_frames
from lightkit.app.serving.frames import pack_header, receive_frame
from lightkit.app.serving.messages import Reply, Request
from lightkit.errors import CheckpointError

# The seconds that a process has to end by itself, which it does at once unless it is stopped.
_SECONDS_TO_END = 2.0


class WorkerLost(Exception):
    """A worker has ended, or was ended."""


class Worker(ABC):
    """The connection to a worker, which answers one batch of requests at a time.

    Attributes:
        name: the name of the worker in messages.
        can_be_killed: True if `end` ends the worker while it computes.
        lost: a future that is done when a started worker has ended; None before the start.
    """

    name: str
    can_be_killed: bool

    def __init__(self) -> None:
        self.lost: asyncio.Future[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._receiver: asyncio.Task[None] | None = None
        # What gets the replies of the batch that is being answered.
        self._reply: Callable[[int, Reply], None] | None = None

    async def start(self) -> dict[str, Any]:
        """Starts the worker, waits until it has restored its model, and returns the description of the model.

        Raises:
            CheckpointError: the worker cannot restore the model, or ended meanwhile.
        """
        ours, theirs = socket.socketpair()
        try:
            self._launch(theirs)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._writer.write(self._first_frame())
        try:
            header, _ = await receive_frame(reader)
        except (asyncio.IncompleteReadError, OSError) as error:
            status = await asyncio.to_thread(self._status)
            await self.end()
            raise CheckpointError(f"{self.name} ended before it had restored the model{status}") from error
        if "error" in header:
            await self.end()
            raise CheckpointError(header["error"])
        self.lost = asyncio.get_running_loop().create_future()
        self._receiver = asyncio.create_task(self._receive(reader, self.lost))
        return header["description"]

    async def _receive(self, reader: asyncio.StreamReader, lost: asyncio.Future[None]) -> None:
        """Passes replies on until the worker has ended."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                header, body = await receive_frame(reader)
                if self._reply is not None:
                    self._reply(header["index"], Reply(header["status"], body))
        if not lost.done():
            lost.set_result(None)

    async def answer(self, requests: Sequence[Request], reply: Callable[[int, Reply], None]) -> None:
        """Has the worker answer a batch.

        Args:
            requests: the requests.
            reply: a function that gets the index and the reply of each request as soon as it is there.

        Raises:
            WorkerLost: the worker has ended; requests without a reply get none.
        """
        assert self._writer is not None and self.lost is not None, "start() comes first"
        missing = len(requests)
        complete = asyncio.get_running_loop().create_future()

        def pass_on(index: int, answer: Reply) -> None:
            nonlocal missing
            reply(index, answer)
            missing -= 1
            if missing == 0 and not complete.done():
                complete.set_result(None)

        self._reply = pass_on
        heads = [
            {"size": len(one.body), "media_type": one.media_type, "query": dict(one.query or {})} for one in requests
        ]
        try:
            self._writer.write(pack_header({"requests": heads}, sum(head["size"] for head in heads)))
            for request in requests:
                self._writer.write(request.body)
            await self._writer.drain()
            await asyncio.wait({complete, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            # The worker has closed the connection; replies that it had sent are there.
            pass
        finally:
            self._reply = None
        if not complete.done():
            raise await self.loss()

    async def loss(self) -> WorkerLost:
        """Returns the error of a worker that has ended."""
        return WorkerLost(f"{self.name} has ended{await asyncio.to_thread(self._status)}")

    async def end(self) -> None:
        """Closes the connection, which ends the worker, and waits until it has ended."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        await asyncio.to_thread(self._join)
        if self._receiver is not None:
            # The end of the connection is its end.
            await self._receiver

    @abstractmethod
    def _launch(self, connection: socket.socket) -> None:
        """Starts the worker on its end of the connection, which it owns from now on."""

    def _first_frame(self) -> bytes:
        """Returns what the worker reads before the first batch."""
        return b""

    def _status(self) -> str:
        """Waits a little for the worker to end, and returns a clause on its exit status, or nothing."""
        return ""

    @abstractmethod
    def _join(self) -> None:
        """Waits until the worker has ended, whose connection is closed."""


class ProcessWorker(Worker):
    """A worker in a process of its own.

    Args:
        spec: the model to restore: see `lightkit.app.serving.worker`.
        directory: the working directory, to which the paths of the model are relative.
    """

    can_be_killed = True

    def __init__(self, spec: dict[str, Any], directory: str) -> None:
        super().__init__()
        self._spec = spec
        self._directory = directory
        self.name = f"the worker on {spec['device']}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The identifier of the process; None before the start."""
        return None if self._process is None else self._process.pid

    def _launch(self, connection: socket.socket) -> None:
        with connection:
            # The worker finds the modules that this process finds. With a session of its own, it does not get the
            # Ctrl-C of a terminal: the server decides about the end. What it prints goes where warnings go.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightkit.app.serving.worker", str(connection.fileno())],
                cwd=self._directory,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
                pass_fds=[connection.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            )

    def _first_frame(self) -> bytes:
        return pack_header(self._spec, 0)

    def _status(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f" (exit status {self._process.wait(_SECONDS_TO_END)})"
        return ""

    def _join(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ThreadWorker(Worker):
    """A worker in a thread of this process, with a model that is in memory.

    Args:
        description: the description of the model: see `lightkit.app.serving.responder.describe`.
        responder: its `lightkit.app.serving.responder.Responder`.
    """

    can_be_killed = False
    name = "the worker of this process"

    def __init__(self, description: dict[str, Any], responder: Any) -> None:
        super().__init__()
        self._description = description
        self._responder = responder
        self._thread: threading.Thread | None = None

    def _launch(self, connection: socket.socket) -> None:
        self._thread = threading.Thread(target=self._run, args=(connection,), daemon=True, name="lightkit-serve-worker")
        self._thread.start()

    def _run(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream:
            stream.write(pack_header({"description": self._description}, 0))
            stream.flush()
            answer_frames(stream, self._responder)

    def _join(self) -> None:
        assert self._thread is not None
        # A long answer is not waited for: the thread is a daemon, and writes to a closed connection.
        self._thread.join(_SECONDS_TO_END)


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
