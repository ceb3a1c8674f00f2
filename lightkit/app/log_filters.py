"""What the entry points do not let through: advice that does not hold here."""

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


def quiet() -> None:
    """Silences advice that does not hold here."""
    # Batches are sliced from memory: worker processes would only slow that down.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # A run directory is not empty: Hydra's own files are in it before the logger's.
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # A resumed run writes to a directory of its own.
    warnings.filterwarnings("ignore", ".*The dirpath has changed from.*")
    # Lightning's own use of torch.
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    # With several processes the running loss is that of the first one: to follow a training it is as good.
    warnings.filterwarnings("ignore", ".*It is recommended to use `self.log.*sync_dist=True.*")
    _warn_in_one_line()
    # What Optuna's data base tools are made of, and that matplotlib has looked for fonts.
    for package in ("alembic", "matplotlib"):
        logging.getLogger(package).setLevel(logging.WARNING)


def _warn_in_one_line() -> None:
    """Prints lightkit's own warnings without the line of code that they come from, which tells a user nothing."""
    inner = warnings.formatwarning
    package = str(Path(__file__).parent.parent)

    def formatted(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None):
        if filename.startswith(package):
            return f"warning: {printable(str(message))}\n"
        return inner(message, category, filename, lineno, line)

    warnings.formatwarning = formatted


def quiet_lightning() -> None:
    """Imports Lightning, without its tips, a line for each kind of device that is not there, and one for each process.

    It sets the levels of its loggers when it is imported, and adds a handler to those that others have.
    """
    importlib.import_module("lightning.pytorch")
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    logging.getLogger("lightning").propagate = False


def with_quiet_lightning(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """The same function, called once Lightning is there and quiet."""

    @functools.wraps(function)
    def call(config: DictConfig) -> Any:
        quiet_lightning()
        return function(config)

    return call
