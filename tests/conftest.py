"""What all tests share."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

from lightkit.native import builder

# The kernels themselves are under test: falling back to the references would test those against themselves.
os.environ.setdefault("LIGHTKIT_NATIVE", "require")

# Examples that fail are shrunk and printed; time limits would fail on a busy machine.
settings.register_profile("lightkit", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("lightkit")


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Compiled before the first test, not in the time that some test gives to a process that it starts."""
    builder.build()


@pytest.fixture
def leaves_no_process_group() -> Iterator[None]:
    """Lightning's strategies leave theirs, and its address in the environment, to the end of the process."""
    with patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m lightkit.NAME ...` as a user would, in a directory of choice."""

    def run(name: str, *arguments: str, cwd: Path, environment: dict[str, str] | None = None, **options):
        return subprocess.run(
            [sys.executable, "-m", f"lightkit.{name}", *arguments],
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            **options,
        )

    return run


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """Does what `command` does, in this process: for what a command says and returns, which takes no process to see."""

    def run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [f"lightkit.{name}", *arguments])
        # The command sets these for its process.
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capsys.readouterr()
        status = importlib.import_module(f"lightkit.{name}").main()
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run
