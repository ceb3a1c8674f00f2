"""What all tests share: the kernels, the order of the tests, and commands to run."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# Threads of OpenMP sleep where they wait for each other. By default they spin, and where other tests want their cores,
# each small operation of torch takes a turn of the scheduler: a test of a second takes half a minute. OpenMP reads this
# once, when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch
from hypothesis import settings
from support import commands, workers

from lightkit.native import builder

# The kernels themselves are under test: falling back to the references would test those against themselves.
os.environ.setdefault("LIGHTKIT_NATIVE", "require")

# Examples that fail are shrunk and printed; time limits would fail on a busy machine.
settings.register_profile("lightkit", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("lightkit")


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def group_of(item: pytest.Item) -> str:
    """Returns the tests that go to the same worker: of a file, the fast ones or the slow ones, which share fixtures."""
    if is_alone(item):
        return "alone"
    named = item.get_closest_marker("group")
    return f"{'slow' if is_slow(item) else 'fast'} {named.args[0] if named else item.nodeid.partition('::')[0]}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the tests: fast ones first, then slow ones, then those that run alone.

    Of the slow ones those of ``native`` come first. They compile for minutes, in one worker: started last, they would
    leave the other worker with nothing to do.
    """
    items.sort(key=lambda item: (is_alone(item), is_slow(item), is_slow(item) and item.path.parent.name != "native"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    workers.publish_groups(session.config, {item.nodeid: group_of(item) for item in session.items})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> workers.GroupScheduling:
    scheduler = workers.GroupScheduling(config, log)
    config.add_cleanup(scheduler.remove_files)
    return scheduler


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Runs a test that is marked ``alone`` while no other worker runs a test."""
    with workers.turn(item.config, is_alone(item)):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Compiled before the first test, not in the time that some test gives to a process that it starts."""
    builder.build()


@pytest.fixture(scope="session", autouse=True)
def no_warm_process_is_left() -> Iterator[None]:
    """Ends the process that `commands.run` forks from."""
    yield
    commands.close()


@pytest.fixture(autouse=True)
def leaves_no_training_behind() -> Iterator[None]:
    """Ends the process group of a training in the test, and restores the variables that Lightning set for it.

    Lightning leaves both to the end of the process. A later training would take itself for one of several processes,
    or for one with a seed.
    """
    names = (*commands.RANK_VARIABLES, "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    is_in_group = torch.distributed.is_initialized()
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)
    if torch.distributed.is_initialized() and not is_in_group:
        torch.distributed.destroy_process_group()


@pytest.fixture
def call(monkeypatch, capsys) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs a command in this process: for what it says and returns, which takes no process to see."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [f"lightkit.{name}", *arguments])
        # The command sets these for its process.
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capsys.readouterr()
        status = importlib.import_module(f"lightkit.{name}").main()
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    yield run
    # Hydra's handlers write to the files of its job: a later test would, in a directory that may be gone.
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
