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
    """`Control.stop` stopped the work before it finished."""


class Control:
    """Starts the commands of a background thread, and lets another thread stop them and read their progress.

    A command ends when this process ends.

    Attributes:
        progress: the progress of the work, which the background thread updates.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def check(self) -> None:
        """Ends the work if another thread has called `stop`.

        Raises:
            Stopped: a thread has called `stop`.
        """
        if self._stopped.is_set():
            raise Stopped("the build was stopped")

    def stop(self) -> None:
        """Ends the running command, and makes `run` and `check` raise `Stopped` from now on."""
        with self._lock:
            self._stopped.set()
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def run(self, command: list[str], directory: Path, lock: int, environment: dict[str, str]) -> subprocess.Popen:
        """Starts a command, and returns its process with standard output and standard error in one pipe.

        If this process ends, the command ends, and ``directory`` is removed.

        Args:
            command: the words of the command.
            directory: the directory in which the command works.
            lock: the descriptor of the builder's lock file. The command inherits it, so that the file stays locked
                until the command ends.
            environment: the environment variables of the command.

        Raises:
            Stopped: a thread has called `stop`.
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
                # With a session of its own, the command does not receive Ctrl-C; this process does, and stops it.
                start_new_session=True,
            )
        return self._process


class BackgroundWork(Generic[_T]):
    """Work in a background thread, which the constructor starts and which ends with the process.

    Args:
        work: the function that the thread calls with a `Control`.
        announcement: the line on standard error while a thread waits for the result.
    """

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
        """Waits for the work and shows its progress; returns the result of ``work``, or raises its exception.

        An exception in the waiting thread, such as KeyboardInterrupt, stops the work. A forked process, which has no
        such thread, does the work again.
        """
        if self._pid != os.getpid():
            # This process was forked from the one with the thread, and has no such thread.
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
        """Stops the work and its command, and waits until the thread has ended; does nothing in a forked process."""
        if self._pid == os.getpid():
            self._control.stop()
            self._done.wait()
