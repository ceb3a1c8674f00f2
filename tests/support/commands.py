"""Runs the commands of lightkit as a user does, and waits for what comes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from support.warm_process import WarmProcess

_TESTS = Path(__file__).parents[1]

_warm = WarmProcess()

# What Lightning sets in a process that it trains in: a process that inherits it would take itself for one of several.
RANK_VARIABLES = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE")


def _variables(given: dict[str, str] | None) -> dict[str, str]:
    """Returns the variables of this process, except those of a training in it, and the given ones."""
    return {**{name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}, **(given or {})}


def python_path(*directories: str | Path) -> dict[str, str]:
    """Returns the variable with which a process finds modules of directories below tests/, and ``support``."""
    places = [str(_TESTS / directory) for directory in directories]
    return {"PYTHONPATH": os.pathsep.join(filter(None, [*places, str(_TESTS), os.environ.get("PYTHONPATH")]))}


def with_modules(*names: str) -> dict[str, str]:
    """Returns variables with which a configuration may name classes of these modules of tests/integration."""
    return {"LIGHTKIT_TARGETS": ",".join(names), **python_path("integration")}


def run(
    name: str,
    *arguments: str,
    cwd: Path,
    environment: dict[str, str] | None = None,
    status: int | None = None,
    timeout: float = 150,
) -> subprocess.CompletedProcess:
    """Runs ``python -m lightkit.NAME`` to its end, in a fork of a process that has imported what it needs.

    Args:
        name: of the command's module, below ``lightkit``.
        arguments: on its command line.
        cwd: its working directory.
        environment: variables beside those of this process.
        status: the exit status it must have; None allows any.
        timeout: seconds after which it is killed.
    """
    variables = _variables(environment)
    result = _warm.run("-m", f"lightkit.{name}", *arguments, cwd=cwd, environment=variables, timeout=timeout)
    assert status is None or result.returncode == status, result.stderr
    return result


def run_code(
    code: str, *arguments: str, environment: dict[str, str], timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs ``python -c code`` to its end, as `run` does, with ``environment`` for all of its variables."""
    return _warm.run("-c", code, *arguments, cwd=Path.cwd(), environment=environment, timeout=300)


def run_python(
    *arguments: str | Path,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    status: int | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Runs this Python in a process of its own, to its end. The arguments are as for `run`.

    After ``timeout`` the error has the stacks of the process and of those that it has started.
    """
    command = [sys.executable, *map(str, arguments)]
    variables = {**_variables(environment), "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=10)
                raise AssertionError(f"{error}:\n{errors}") from None
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    result = subprocess.CompletedProcess(command, process.returncode, output, errors)
    assert status is None or result.returncode == status, result.stderr
    return result


def close() -> None:
    """Ends the process from which `run` forks."""
    _warm.close()


def the_error(result: subprocess.CompletedProcess) -> str:
    """Returns the one line of error with which a command has failed, without a traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]
