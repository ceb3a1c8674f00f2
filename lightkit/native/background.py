"""Runs compilers in the background; they end with this process."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar, cast

from .progress import Progress, ProgressLine

# The interval at which the progress line is drawn, in seconds.
_DRAW_INTERVAL = 0.2

_T = TypeVar("_T")


class Stopped(RuntimeError):
    """The work was stopped before it finished."""


class Control:
    """The state that work shares with the threads that wait for it: its progress, and a request to stop."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def check(self) -> None:
        """Raises `Stopped` after `stop` was called."""
        if self._stopped.is_set():
            raise Stopped("the build was stopped")

    def stop(self) -> None:
        """Stops the work: ends the running command, and starts no other."""
        with self._lock:
            self._stopped.set()
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def run(self, command: list[str], directory: Path, lock: int, environment: dict[str, str]) -> subprocess.Popen:
        """Starts a command with its output in a pipe.

        If this process ends, the command ends, and `directory` is removed. The command inherits the descriptor `lock`,
        so that the file stays locked until the command ends.
        """
        supervise = Path(__file__).with_name("supervise.py")
        with self._lock:
            self.check()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.fspath(supervise), os.fspath(directory), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=(lock,),
                # Ctrl-C reaches this process, which stops the command.
                start_new_session=True,
            )
        return self._process


class BackgroundWork(Generic[_T]):
    """Runs ``work(control)`` in a thread."""

    def __init__(self, work: Callable[[Control], _T], announcement: str) -> None:
        self._work = work
        self._announcement = announcement
        self._control = Control()
        self._done = threading.Event()
        self._value: _T | None = None
        self._error: BaseException | None = None
        self._pid = os.getpid()
        atexit.register(self.stop)
        threading.Thread(target=self._run, name="lightkit-native", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._work(self._control)
        except BaseException as error:
            self._error = error
        finally:
            atexit.unregister(self.stop)
            self._done.set()

    def result(self) -> _T:
        """Waits for the work and shows its progress; returns its result, or raises its exception.

        An exception in the wait, such as KeyboardInterrupt, stops the work.
        """
        if self._pid != os.getpid():
            # This process was forked from the one that owns the thread.
            return BackgroundWork(self._work, self._announcement).result()
        progress, line = self._control.progress, None
        try:
            while not self._done.wait(_DRAW_INTERVAL):
                if progress.total:
                    line = line or ProgressLine(self._announcement)
                    line.draw(progress)
        except BaseException:
            self.stop()
            raise
        finally:
            if progress.total:
                (line or ProgressLine(self._announcement)).close()
        if self._error is not None:
            raise self._error
        if progress.seconds is not None:
            print(f"lightkit: compiled in {progress.seconds:.0f} s", file=sys.stderr, flush=True)
        return cast(_T, self._value)

    def stop(self) -> None:
        """Ends the work and its commands, and waits until their files are removed."""
        if self._pid == os.getpid():
            self._control.stop()
            self._done.wait()
