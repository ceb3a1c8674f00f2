"""Servers on this machine, for the time of a job: started, started again when they die, and ended with it."""

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
from lightkit.parameter_server.rendezvous import SECRET

_log = logging.getLogger(__name__)

# How often a server may come back: one that dies at each start does so for a reason.
_RESTARTS = 10


class LocalServers:
    """Processes that serve a job.

    Args:
        count: how many.
        secret: that workers must know.
        directory: for their snapshots, of this run alone: it is removed in the end. None for none.
        host: address of this machine that the workers reach.
        timeout: see `lightkit.parameter_server.Server`.

    Raises:
        LightkitError: one does not come up.
    """

    def __init__(
        self, count: int, secret: str, directory: Path | None, host: str = "127.0.0.1", timeout: float = 30.0
    ) -> None:
        self._secret, self._directory, self._host, self._timeout = secret, directory, host, timeout
        self._stopping = threading.Event()
        self.processes = [self._start(number, 0) for number in range(count)]
        try:
            self.addresses = [_address_of(process) for process in self.processes]
        except LightkitError:
            self.stop()
            raise
        threading.Thread(target=self._keep, daemon=True).start()

    def stop(self, seconds: float = 0.0) -> None:
        """Ends those that have not ended by themselves in so long."""
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
                # Unless other runs have theirs there.
                self._directory.parent.rmdir()

    def _start(self, number: int, port: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "lightkit.parameter_server", "--leave-with-parent"]
        command += ["--host", self._host, "--port", str(port), "--timeout", str(self._timeout)]
        if self._directory is not None:
            command += ["--directory", str(self._directory / str(number))]
        # A session of its own: Ctrl-C at the terminal is the workers' to hear.
        return subprocess.Popen(
            command,
            env={**os.environ, SECRET: self._secret},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _keep(self) -> None:
        restarts = 0
        while not self._stopping.wait(0.1):
            for number, process in enumerate(self.processes):
                if process.poll() in (None, 0) or self._stopping.is_set() or restarts == _RESTARTS:
                    continue
                restarts += 1
                _log.warning("parameter server %d ended with status %s: started again", number, process.returncode)
                self.processes[number] = self._start(number, int(self.addresses[number].rpartition(":")[2]))


def _address_of(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        raise LightkitError(f"a parameter server did not come up: it ended with status {process.wait()}")
    return line.split()[-1]
