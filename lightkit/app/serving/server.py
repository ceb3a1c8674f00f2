"""A server: listens, starts the workers, answers requests until it is stopped, and ends all of its processes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lightkit._util.installation import how_to_install
from lightkit.app.serving.dispatch import Dispatcher
from lightkit.app.serving.settings import ServerSettings
from lightkit.app.serving.workers import ProcessWorker, ThreadWorker, Worker
from lightkit.errors import ConfigError
from lightkit.runtime.termination import raising_on_sigterm
from lightkit.targets import user_packages

if TYPE_CHECKING:
    from lightkit.fitting import FitResult

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_PACKAGES = ("fastapi", "fastapi_offline", "uvicorn")

# The seconds in which requests may be answered after the server was asked to stop, and those in which the answers that
# it stops may then be sent.
_SECONDS_TO_FINISH, _SECONDS_TO_SEND = 3, 2

_SECONDS_TO_LOOK = 0.01

# The connections that the system holds before the server accepts them.
_BACKLOG = 512


class Server:
    """Serves a model by HTTP.

    As a context manager the server answers requests in the background, from the moment in which the body of ``with``
    begins until its end. `run` answers them in the calling thread until Ctrl-C or SIGTERM.

    Args:
        model: files and directories as ``python -m lightkit.predict`` takes them, a text or a sequence, from which each
            worker process restores the model; or the result of `lightkit.fit` or `lightkit.load`, whose model predicts
            in a thread of this process, on the device on which it is.
        trust: allow exports in a format in which a file can run code: see `lightkit.export.open_export`.
        **settings: the fields of a `ServerSettings`.

    Raises:
        ConfigError: a setting is wrong, or a package is missing.
    """

    def __init__(self, model: Paths | FitResult, *, trust: bool = False, **settings: Any) -> None:
        _check_packages()
        names = [field.name for field in fields(ServerSettings)]
        for name in settings:
            if name not in names:
                raise ConfigError(f"{name!r} is no setting of a server; expected {', '.join(names)}")
        self.settings = ServerSettings(**settings)
        self._spec: dict[str, Any] | None = None
        self._result: FitResult | None = None
        if isinstance(model, (str, os.PathLike, Sequence)):
            self._spec = {"model": _expanded(model), "trust": trust, "max_length": self.settings.max_length}
        elif self.settings.workers != 1 or self.settings.devices != "auto":
            raise ConfigError(
                "workers and devices go with files: a model in memory predicts in this process, on its own device"
            )
        else:
            self._result = model
        self._directory = os.getcwd()
        self._port = self.settings.port
        self._workers: list[Worker] = []
        self._thread: threading.Thread | None = None
        self._http: Any = None
        self._is_ready = threading.Event()
        self._failure: BaseException | None = None

    @property
    def port(self) -> int:
        """The port on which the server listens, or has listened; before that, the setting."""
        return self._port

    @property
    def url(self) -> str:
        """The address of the server, such as ``http://127.0.0.1:8000``."""
        host = self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def worker_pids(self) -> list[int]:
        """The identifiers of the worker processes."""
        pids = (worker.pid for worker in self._workers if isinstance(worker, ProcessWorker))
        return [pid for pid in pids if pid is not None]

    def run(self, announce: Callable[[str], None] | None = None) -> None:
        """Answers requests until Ctrl-C or SIGTERM, which raise `KeyboardInterrupt` and `lightkit.errors.Terminated`.

        The processes of the workers have ended when the method returns or raises.

        Args:
            announce: a function that gets the address of the server as soon as requests are answered.

        Raises:
            CheckpointError: the model cannot be restored or does not work.
            ConfigError: the address is in use or not of this machine.
        """
        with (
            raising_on_sigterm() if threading.current_thread() is threading.main_thread() else contextlib.nullcontext()
        ):
            asyncio.run(self._serve(announce))

    def __enter__(self) -> Server:
        """Starts the server in the background, and returns it when it answers requests.

        Raises:
            CheckpointError: as `run`.
            ConfigError: as `run`.
        """
        self._is_ready.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run_in_background, daemon=True, name="lightkit-serve")
        self._thread.start()
        self._is_ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Stops the server and ends its processes; raises the error of a server that has stopped by itself."""
        assert self._thread is not None
        self._http.should_exit = True
        self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

    def _run_in_background(self) -> None:
        try:
            asyncio.run(self._serve(None))
        except BaseException as error:
            self._failure = error
        finally:
            self._is_ready.set()

    async def _serve(self, announce: Callable[[str], None] | None) -> None:
        listener = _listen(self.settings.host, self.settings.port)
        self._port = listener.getsockname()[1]
        self._workers = []
        tasks: list[asyncio.Task[None]] = []
        try:
            description = await self._start_workers()
            dispatcher = Dispatcher(self.settings, description["is_batched"])
            tasks = [asyncio.create_task(dispatcher.run(worker)) for worker in self._workers]
            self._http = _http_server(description, self.settings, dispatcher)
            tasks.append(asyncio.create_task(self._announce(announce)))
            tasks.append(asyncio.create_task(self._close_after_stop(dispatcher)))
            for task in tasks:
                task.add_done_callback(self._stop_after_failure)
            await self._http.serve(sockets=[listener])
            for task in tasks:
                if task.done() and not task.cancelled():
                    # A fault of the program: nobody would answer any more.
                    task.result()
        finally:
            # uvicorn raises Ctrl-C again when it has stopped, which cancels this very coroutine.
            await _to_the_end(self._end(tasks))
            listener.close()

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))

    def _stop_after_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._http.should_exit = True

    async def _start_workers(self) -> dict[str, Any]:
        """Starts all workers, and returns the description of the model."""
        if self._result is not None:
            self._workers = [_thread_worker(self._result, self.settings.max_length)]
            return await self._workers[0].start()
        devices, started = self.settings.devices, []
        if devices == "auto":
            # The number of GPUs is known to a worker: this process does without torch.
            started = await self._start_on(["auto"])
            names = [f"cuda:{index}" for index in range(started[0]["gpus"])] or ["cpu"]
        else:
            names = ["cpu"] if isinstance(devices, str) else [f"cuda:{index}" for index in range(devices)]
        rest = (names * self.settings.workers)[len(started) :]
        return [*started, *await self._start_on(rest)][0]

    async def _start_on(self, devices: Sequence[str]) -> list[dict[str, Any]]:
        """Starts a worker on each device, and returns their descriptions."""
        assert self._spec is not None
        shared = {**self._spec, "workers": self.settings.workers, "packages": user_packages()}
        workers = [ProcessWorker({**shared, "device": device}, self._directory) for device in devices]
        self._workers += workers
        return await _gather([worker.start() for worker in workers])

    async def _announce(self, announce: Callable[[str], None] | None) -> None:
        while not self._http.started:
            await asyncio.sleep(_SECONDS_TO_LOOK)
        self._is_ready.set()
        if announce is not None:
            announce(self.url)

    async def _close_after_stop(self, dispatcher: Dispatcher) -> None:
        while not self._http.should_exit:
            await asyncio.sleep(10 * _SECONDS_TO_LOOK)
        await asyncio.sleep(_SECONDS_TO_FINISH)
        dispatcher.close()


def serve(model: Paths | FitResult, *, trust: bool = False, **settings: Any) -> None:
    """Serves a model by HTTP until Ctrl-C or SIGTERM, and prints its address when it answers requests.

    ``lightkit.serve.serve("runs/cnn/2026-01-01_12-00-00", port=8000)`` does what ``python -m lightkit.serve`` does.

    Args:
        model: files, directories or a result: see `Server`.
        trust: likewise.
        **settings: the fields of a `ServerSettings`.

    Raises:
        CheckpointError: a file is missing, or the model cannot be restored or does not work.
        ConfigError: a setting is wrong, a package is missing, or the address is in use.
    """
    Server(model, trust=trust, **settings).run(
        lambda url: print(f"serving at {url}, described at {url}/docs", flush=True)
    )


def _expanded(model: Paths) -> str | list[str]:
    """Returns the paths of a model, in which ``~`` stands for a home directory.

    Raises:
        ConfigError: the sequence is empty.
    """
    if isinstance(model, (str, os.PathLike)):
        return os.path.expanduser(os.fspath(model))
    if not model:
        raise ConfigError("model must name at least one file, got an empty list")
    return [os.path.expanduser(os.fspath(path)) for path in model]


def _check_packages() -> None:
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"serving needs the package {name.replace('_', '-')}: {how_to_install('serve')}"
            ) from error


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address.

    Raises:
        ConfigError: the address is in use, or is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        # Connections inherit it. asyncio sets it only for sockets that name their protocol, and without it the second
        # packet of an answer waits for the client's delayed acknowledgement of the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        # asyncio and the resolver have words of their own, and the resolver negative numbers.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or str(error)
        raise ConfigError(f"the server cannot listen on host={host} port={port}: {reason}") from error


def _http_server(description: dict[str, Any], settings: ServerSettings, dispatcher: Dispatcher) -> Any:
    # Imported here: a worker and --help need no HTTP.
    import uvicorn

    from lightkit.app.serving.http import build_app

    return uvicorn.Server(
        uvicorn.Config(
            build_app(description, settings, dispatcher),
            lifespan="off",
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_SECONDS_TO_FINISH + _SECONDS_TO_SEND,
        )
    )


def _thread_worker(result: FitResult, max_length: int) -> ThreadWorker:
    from lightkit.app.serving.kinds import find_kind
    from lightkit.app.serving.responder import Responder, describe
    from lightkit.data import ImageDataModule

    form = result.image_format() if isinstance(result.data, ImageDataModule) else None
    kind = find_kind(result.task.eval(), result.data, form=form, max_length=max_length)
    return ThreadWorker(describe(kind, result.task), Responder(kind))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end, and raises a cancellation only then."""
    task = asyncio.create_task(work)
    cancellation = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancellation = error
    task.result()
    if cancellation is not None:
        raise cancellation


async def _gather(starts: Sequence[Coroutine[Any, Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Waits for all workers to start; if one fails, cancels the others and raises its error."""
    tasks = [asyncio.create_task(start) for start in starts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
