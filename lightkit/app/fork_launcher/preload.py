"""The imports of a job, done before the fork, and checks that the process can fork."""

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

from lightkit.app.log_filters import import_lightning_silently
from lightkit.app.schema import top_level
from lightkit.config import find_class
from lightkit.errors import ConfigError, LightkitError
from lightkit.runtime.environment import is_under_torchrun

# Modules that jobs import, some of them only when a job needs them.
_JOB_MODULES = (
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

_THREADS_DIRECTORY = Path("/proc/self/task")

# Seconds that the kernel may take to remove a joined thread from its list.
_THREAD_EXIT_TIMEOUT = 1.0

_ADVICE = "leave hydra/launcher=fork out to run the jobs in this process, one after the other"


def check_platform() -> None:
    """Rejects ``hydra/launcher=fork`` in a process that cannot fork.

    Raises:
        ConfigError: the platform is not Linux, torchrun started the process, or CUDA is initialized.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"hydra/launcher=fork works on Linux alone, and this is {sys.platform}: {_ADVICE}")
    if is_under_torchrun():
        raise ConfigError(f"hydra/launcher=fork cannot run under torchrun, whose processes would not fork: {_ADVICE}")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise ConfigError(f"hydra/launcher=fork: CUDA is initialized, and does not work in a forked process: {_ADVICE}")


def preload(config: DictConfig) -> None:
    """Imports the modules of a job, loads the native library, and reads the top-level keys of ``conf/train.yaml``.

    None of this starts a thread, which a fork would lose. The function preserves the state of Python's random
    generator, from which sweepers draw.

    Args:
        config: the configuration of the sweep; the function imports the classes that it names.

    Raises:
        LightkitError: the native library is required and not available.
    """
    state = random.getstate()
    try:
        _import_all(config)
    finally:
        random.setstate(state)


def _import_all(config: DictConfig) -> None:
    import_lightning_silently()
    for name in _JOB_MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            # An extra is not installed; the job that needs it raises the error.
            continue
    from lightkit import native

    native.load()
    top_level("train")
    for target in _target_names(OmegaConf.to_container(config, resolve=False)):
        try:
            find_class(target)
        except (LightkitError, ImportError):
            # The job that builds the class raises the error.
            continue


def check_threads() -> None:
    """Rejects a process with several threads; a forked process has their locks and none of the threads.

    NumPy and SciPy each have an OpenBLAS, which starts threads at import, joins them before every fork and starts them
    again when it needs them. The function therefore first forks a process that ends at once.

    Raises:
        ConfigError: the process has other threads; the message has their names.
    """
    if len(os.listdir(_THREADS_DIRECTORY)) > 1:
        process = os.fork()
        if process == 0:
            os._exit(0)
        os.waitpid(process, 0)
    end = time.monotonic() + _THREAD_EXIT_TIMEOUT
    while (is_threaded := len(os.listdir(_THREADS_DIRECTORY)) > 1) and time.monotonic() < end:
        time.sleep(0.001)
    if is_threaded:
        raise ConfigError(
            "hydra/launcher=fork: the process that the jobs fork from has other threads "
            f"({', '.join(_other_threads())}): {_ADVICE}"
        )


def _other_threads() -> Iterator[str]:
    """Yields the names of all threads of this process except the main thread.

    The name of a thread of Python is Python's; the name of any other thread is the operating system's.
    """
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    for task in _THREADS_DIRECTORY.iterdir():
        if task.name != str(os.getpid()):
            yield names.get(task.name) or (task / "comm").read_text().strip()


def _target_names(node: Any) -> Iterator[str]:
    """Yields the ``_target_`` of each node at and below ``node`` in a configuration."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _target_names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _target_names(value)
