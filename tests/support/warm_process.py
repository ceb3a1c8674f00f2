"""Runs commands in forks of a process that has imported torch, Lightning and the application.

A command imports for seconds before it does anything. The warm process imports once. For each command it forks a
child, which has the command's arguments, directory, environment and output, and runs it as ``python -m`` does.
What a process does while it imports is not seen here: such a test starts a process of its own.

The parent writes a request, one line of JSON, and reads two lines: the child's process id, then its exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

# What every command imports while it runs. Not the commands' own modules: runpy executes these.
_IMPORTS = (
    "lightkit.app.training",
    "lightkit.app.evaluation",
    "lightkit.app.prediction",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
)


class WarmProcess:
    """A process that forks a child for each command, one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def run(
        self, option: str, program: str, *arguments: str, cwd: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess:
        """Runs ``python -m program`` or ``python -c program`` with ``arguments`` to its end.

        Args:
            option: ``-m`` for a module, ``-c`` for source text.
            program: the module's name or the text.
            arguments: on the command line.
            cwd: its working directory.
            environment: all of its variables.
            timeout: seconds.

        Raises:
            subprocess.TimeoutExpired: It has not ended after ``timeout`` seconds. The child is killed.
        """
        if self._process is None:
            command = [sys.executable, __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        with tempfile.TemporaryDirectory() as place:
            files = [Path(place) / name for name in ("stdout", "stderr")]
            request = {
                "option": option,
                "program": program,
                "arguments": arguments,
                "cwd": str(cwd),
                "environment": environment,
                "files": [str(file) for file in files],
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            pid = int(self._process.stdout.readline())
            ready, _, _ = select.select([self._process.stdout], [], [], timeout)
            if not ready:
                os.kill(pid, signal.SIGKILL)
            status = int(self._process.stdout.readline())
            output, errors = (file.read_text() for file in files)
        if not ready:
            raise subprocess.TimeoutExpired([program, *arguments], timeout, output, errors)
        return subprocess.CompletedProcess([program, *arguments], status, output, errors)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None


def _run(request: dict) -> NoReturn:
    """Becomes the process of a command."""
    for target, path in zip((1, 2), request["files"], strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, target)
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    paths = request["environment"].get("PYTHONPATH", "")
    # As `python -m` has it: the directory of the process, PYTHONPATH, the rest.
    sys.path[:0] = [request["cwd"], *filter(None, paths.split(os.pathsep))]
    option, program = request["option"], request["program"]
    sys.argv = [program if option == "-m" else option, *request["arguments"]]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    raise SystemExit


def _serve() -> None:
    """Imports, and forks for each request until the standard input ends."""
    import gc
    import importlib

    # The first directory is that of this file.
    del sys.path[0]
    gc.disable()
    from lightkit._util import lazy_imports

    lazy_imports.defer()
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    # Not by iteration, which reads ahead.
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
