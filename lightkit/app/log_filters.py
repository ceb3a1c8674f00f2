"""Filters of log messages and warnings whose advice does not apply to lightkit's jobs."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightkit._util.printable import printable


def filter_warnings() -> None:
    """Suppresses warnings whose advice does not apply, and shortens lightkit's own warnings to one line."""
    # Data modules slice batches from memory; worker processes would slow that down.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Hydra writes its own files into the run directory before the logger does.
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # A resumed run writes to a new directory.
    warnings.filterwarnings("ignore", ".*The dirpath has changed from.*")
    # lightkit needs no srun on the node of a user's shell.
    warnings.filterwarnings("ignore", ".*The `srun` command is available on your system.*")
    # Lightning's own code causes this warning of torch.
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    # The progress bar shows the loss of the first process, which suffices to follow a training.
    warnings.filterwarnings("ignore", ".*It is recommended to use `self.log.*sync_dist=True.*")
    _shorten_own_warnings()
    # Alembic logs each migration of Optuna's database; matplotlib logs its search for fonts.
    for package in ("alembic", "matplotlib"):
        logging.getLogger(package).setLevel(logging.WARNING)


def _shorten_own_warnings() -> None:
    """Prints lightkit's own warnings without the source line, which does not help a user."""
    original = warnings.formatwarning
    package = str(Path(__file__).parent.parent)

    def formatted(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None):
        if filename.startswith(package):
            return f"warning: {printable(str(message))}\n"
        return original(message, category, filename, lineno, line)

    warnings.formatwarning = formatted


def import_lightning_silently() -> None:
    """Imports Lightning and silences its log messages on tips, available devices and processes.

    The import itself sets the levels of Lightning's loggers and adds a handler, so that the levels set before it do
    not last.
    """
    importlib.import_module("lightning.pytorch")
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    logging.getLogger("lightning").propagate = False


def with_silent_lightning(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Returns a function that calls `import_lightning_silently` and then ``function``."""

    @functools.wraps(function)
    def call(config: DictConfig) -> Any:
        import_lightning_silently()
        return function(config)

    return call
