"""A server: it holds a shard of the parameters, makes steps with pushed gradients, and survives failing workers."""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path

import torch

from lightkit.errors import ConfigError
from lightkit.parameter_server.rendezvous import Listener
from lightkit.parameter_server.status import ServerStatus
from lightkit.parameter_server.training import Training
from lightkit.parameter_server.transport import Connection
from lightkit.parameter_server.worker_session import WorkerSession
from lightkit.parameter_server.write_ahead_log import WriteAheadLog

_log = logging.getLogger(__name__)

# The most connections after the handshake, each with a thread. A process may have about twice as many descriptors.
_MAX_SESSIONS = 512


class Server:
    """A server of one training, with a thread for each worker.

    Args:
        host: an address of this machine that the workers can reach; ``127.0.0.1`` for workers on this machine alone.
        port: the port; 0 for any free port, which ``listener.port`` then has.
        secret: the secret that workers must know.
        directory: the directory of the snapshot and the log, from which the server recovers; None for a server that
            does not recover.
        timeout: the seconds without a heartbeat after which a worker counts as gone. The server notices the end of a
            worker's process at once.
        recover_until_damage: continue from the last update before the damage of a damaged log, and keep the rest of
            the log under another name; False makes a damaged log an error.

    Raises:
        ConfigError: the server cannot listen on the address, or ``timeout`` is out of range.
        CheckpointError: the files in the directory are damaged.
        OSError: the directory is not writable.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: str = "",
        directory: str | Path | None = None,
        timeout: float = 30.0,
        recover_until_damage: bool = False,
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ConfigError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self.listener = Listener(host, port, secret, timeout)
        self._log = WriteAheadLog(directory, recover_until_damage) if directory is not None else None
        self._training = Training(self._log, timeout)
        self._stopped = threading.Event()
        self._sessions, self._counting = 0, threading.Lock()
        try:
            self._training.recover()
            # The first optimizer of a process makes torch import its compiler, which takes seconds: a worker would
            # miss heartbeats meanwhile.
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
            # No worker can connect before the server knows its training.
            self.listener.listen()
        except BaseException:
            self._close()
            raise

    def run(self) -> None:
        """Serves until all workers have left, and then removes the snapshot and the log.

        Raises:
            LightkitError: all workers are lost, and none has come back within ``timeout`` seconds.
        """
        try:
            while not self._stopped.is_set() and not self._training.is_over(seconds=0.2):
                if (connection := self.listener.accept(0.2)) is not None:
                    self._start_session(connection)
            if self._log is not None and not self._stopped.is_set():
                self._log.clear()
        finally:
            self._close()

    def stop(self) -> None:
        """Makes `run` end soon and keep the snapshot and the log; any thread may call the method."""
        self._stopped.set()

    def status(self) -> ServerStatus:
        """Returns the status of the server; waits while the server writes a snapshot. Any thread may call this."""
        return self._training.status(self._sessions)

    def _close(self) -> None:
        """Releases the port, the connections and the directory."""
        self.listener.close()
        with self._training.changed:
            for connection in self._training.members.connections.values():
                connection.close()
            if self._log is not None:
                self._log.close()

    def _start_session(self, connection: Connection) -> None:
        with self._counting:
            if self._sessions >= _MAX_SESSIONS:
                _log.warning("a worker is refused: the server has %d connections already", _MAX_SESSIONS)
                connection.release()
                return
            self._sessions += 1
        try:
            threading.Thread(target=self._run_session, args=(connection,), daemon=True).start()
        except RuntimeError as error:
            self._end_session(connection)
            _log.warning("a worker is refused: %s", error)

    def _run_session(self, connection: Connection) -> None:
        try:
            WorkerSession(self._training, connection).run()
        finally:
            self._end_session(connection)

    def _end_session(self, connection: Connection) -> None:
        connection.release()
        with self._counting:
            self._sessions -= 1
