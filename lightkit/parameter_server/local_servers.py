"""Server processes on this machine for one training, which are started, restarted after a crash, and stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from lightkit.errors import LightkitError
from lightkit.parameter_server.rendezvous import SECRET_VARIABLE

_log = logging.getLogger(__name__)

# The most restarts of all servers together: a server that dies at each start does so for a reason.
_MAX_RESTARTS = 10


class LocalServers:
    """The server processes of one training.

    Args:
        count: the number of servers.
        secret: the secret that workers must know.
        directory: the directory of snapshots and logs, for this training alone, which `stop` removes; None for servers
            that do not recover.
        host: an address of this machine that the workers can reach.
        timeout: the seconds without a heartbeat after which a server takes a worker for gone.

    Attributes:
        processes: the server processes.
        addresses: the address ``HOST:PORT`` of each server.

    Raises:
        LightkitError: a server does not start.
    """

    def __init__(
        self, count: int, secret: str, directory: Path | None, host: str = "127.0.0.1", timeout: float = 30.0
    ) -> None:
        self._secret, self._directory, self._host, self._timeout = secret, directory, host, timeout
        self._stopping = threading.Event()
        self.processes = [self._start(index, 0) for index in range(count)]
        try:
            self.addresses = [_address_of(process) for process in self.processes]
        except LightkitError:
            self.stop()
            raise
        threading.Thread(target=self._restart_dead_servers, daemon=True).start()

    def stop(self, seconds: float = 0.0) -> None:
        """Kills the servers that have not ended after ``seconds``, and removes the directory."""
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            time.sleep(0.02)
        self._stopping.set()
        for process in self.processes:
            process.kill()
            process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            with contextlib.suppress(OSError):
                # The parent may have the directories of other runs.
                self._directory.parent.rmdir()

    def _start(self, index: int, port: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lightkit.parameter_server", "--leave-with-parent"]
        command += ["--host", self._host, "--port", str(port), "--timeout", str(self._timeout)]
        if self._directory is not None:
            command += ["--directory", str(self._directory / str(index))]
        # With a session of its own, a server does not receive the Ctrl-C of a terminal: the workers do.
        return subprocess.Popen(
            command,
            env={**os.environ, SECRET_VARIABLE: self._secret},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _restart_dead_servers(self) -> None:
        restarts = 0
        while not self._stopping.wait(0.1):
            for index, process in enumerate(self.processes):
                if process.poll() in (None, 0) or self._stopping.is_set() or restarts == _MAX_RESTARTS:
                    continue
                restarts += 1
                _log.warning("parameter server %d ended with status %s: restarting", index, process.returncode)
                self.processes[index] = self._start(index, int(self.addresses[index].rpartition(":")[2]))


def _address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        raise LightkitError(f"a parameter server did not come up: it ended with status {process.wait()}")
    return line.split()[-1]
