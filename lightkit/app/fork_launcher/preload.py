"""Imports everything that a job needs, and checks that the process may fork afterwards."""

from __future__ import annotations

import importlib
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightkit.app.log_filters import quiet_lightning
from lightkit.app.schema import top_level
from lightkit.config import find_class
from lightkit.errors import ConfigError, LightkitError
from lightkit.runtime.environment import is_under_torchrun

# What jobs import, some of it only at the part that needs it.
_MODULES = (
    "lightkit.app.training",
    "lightkit.memory",
    "lightkit.app.report.classification",
    "lightkit.app.report.figures",
    "lightkit.app.report.forecast",
    "lightkit.app.report.language_model",
    "lightkit.app.report.page",
    "matplotlib.backends.backend_agg",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
    "torch.utils.tensorboard",
    "torchmetrics.aggregation",
    "torchmetrics.classification",
    "torchmetrics.regression",
)

_TASKS = Path("/proc/self/task")

# Seconds in which a thread that has been waited for leaves the kernel's list.
_LEAVING = 1.0

_ADVICE = "leave hydra/launcher=fork out to run the jobs in this process, one after the other"


def check_platform() -> None:
    """Refuses to fork where that cannot work.

    Raises:
        ConfigError: this is not Linux, torchrun has started the process, or CUDA is initialized.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"hydra/launcher=fork works on Linux alone, and this is {sys.platform}: {_ADVICE}")
    if is_under_torchrun():
        raise ConfigError(f"hydra/launcher=fork cannot run under torchrun, whose processes would not fork: {_ADVICE}")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise ConfigError(f"hydra/launcher=fork: CUDA is initialized, and does not work in a forked process: {_ADVICE}")


def preload(config: DictConfig) -> None:
    """Imports what a job imports, loads the native library, and composes what every job is compared with.

    None of this starts a thread that a fork would lose. Python's random numbers, which sweepers draw from, stay as
    they were.

    Args:
        config: of the sweep; the classes that it names are imported, too.

    Raises:
        LightkitError: the native library is required and cannot be had.
    """
    state = random.getstate()
    try:
        _import_all(config)
    finally:
        random.setstate(state)


def _import_all(config: DictConfig) -> None:
    quiet_lightning()
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            # Of an extra that is not installed: the job that needs it says so.
            continue
    from lightkit import native

    native.load()
    top_level("train")
    for target in _targets(OmegaConf.to_container(config, resolve=False)):
        try:
            find_class(target)
        except (LightkitError, ImportError):
            # The job that builds it says so.
            continue


def check_threads() -> None:
    """Refuses to fork a process that has threads, of which the fork would have none, while it keeps their locks.

    OpenBLAS (a copy each in NumPy and SciPy) starts its threads at import. It ends them before any fork, and starts
    them again when it needs them; so does the first fork here, of a process that ends at once.

    Raises:
        ConfigError: there are others; names them.
    """
    if len(os.listdir(_TASKS)) > 1:
        process = os.fork()
        if process == 0:
            os._exit(0)
        os.waitpid(process, 0)
    end = time.monotonic() + _LEAVING
    while (is_threaded := len(os.listdir(_TASKS)) > 1) and time.monotonic() < end:
        time.sleep(0.001)
    if is_threaded:
        raise ConfigError(
            "hydra/launcher=fork: the process that the jobs fork from has other threads "
            f"({', '.join(_other_threads())}): {_ADVICE}"
        )


def _other_threads() -> Iterator[str]:
    """Yields the names of all threads except the main one: Python's, or else the kernel's."""
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    for task in _TASKS.iterdir():
        if task.name != str(os.getpid()):
            yield names.get(task.name) or (task / "comm").read_text().strip()


def _targets(node: Any) -> Iterator[str]:
    """Yields the names of the classes in a configuration."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)
