"""The directories of runs and sweeps: a free name for a new one, and none in which another run would be overwritten."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightkit._util.directory_lock import release
from lightkit._util.printable import printable
from lightkit.app.run_records import HYDRA_DIRECTORY, OUTPUT, display_path, find_results, is_empty
from lightkit.errors import ConfigError

# An interpolation of Hydra's resolver for the time, and one of another key.
_TIME = re.compile(r"\$\{now:")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")

# The files that Hydra writes before a job begins.
_HYDRA_FILES = {"config.yaml", "hydra.yaml", "overrides.yaml"}

# The number of references that are followed from one key to another.
_MAX_REFERENCES = 8

# The number of files that a message lists.
_SHOWN = 3


def is_named_by_time(config: DictConfig, key: str) -> bool:
    """Returns True if the value of a dotted ``key`` contains the time, itself or by the keys that it refers to."""
    pending = [key]
    for _ in range(_MAX_REFERENCES):
        if not pending:
            break
        parent, _, name = pending.pop().rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_missing(node, name):
            continue
        raw = str(OmegaConf.to_container(node, resolve=False)[name])  # pyright: ignore
        if _TIME.search(raw):
            return True
        pending += _REFERENCE.findall(raw)
    return False


def make_new(directory: Path) -> Path:
    """Makes a directory that did not exist: ``directory``, or with ``_2``, ``_3`` and so on behind its name.

    Two processes that call the function at the same time get different directories.

    Returns:
        The directory that the function made.

    Raises:
        OSError: the directory cannot be made.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    path, number = directory, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = directory.with_name(f"{directory.name}_{number}")


def remove_unbegun(directory: Path) -> None:
    """Removes the directory of a job that an error ended before its run began.

    The function leaves a directory with other files than Hydra's own and an empty log, and the current directory.
    """
    own, log = directory / HYDRA_DIRECTORY, directory / OUTPUT
    try:
        is_other = set(os.listdir(directory)) - {own.name, log.name} or set(os.listdir(own)) - _HYDRA_FILES
        if is_other or (log.exists() and not is_empty(log)) or directory.samefile(os.curdir):
            return
        release(directory)
        shutil.rmtree(directory)
    except OSError:
        # The error of the job is the one to report.
        return


def check_sweep_directory(directory: Path) -> None:
    """Rejects the directory of a new sweep, if a run lies in it or below it.

    Raises:
        ConfigError: the directory holds a run; the message has its path.
    """
    for folder, folders, _ in os.walk(directory):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if results := find_results(Path(folder)):
            raise ConfigError(
                f"hydra.sweep.dir={display_path(directory)} holds a run already, {display_path(Path(folder))} with "
                f"{_shorten(results)}: name another directory, or go on with an unfinished sweep by ckpt_path=last"
            )


def check_free(key: str, directory: Path, checkpoint: str | None) -> None:
    """Rejects a directory that holds a run, except if the new run resumes from a checkpoint there.

    Args:
        key: the key that names the directory, for the message.
        directory: the directory; it need not exist.
        checkpoint: the checkpoint from which the new run resumes; None for a new training.

    Raises:
        ConfigError: the directory holds another run; the message has its files.
    """
    if is_within(checkpoint, directory) or not (results := find_results(directory)):
        return
    found = "" if checkpoint is None else f", and ckpt_path is {display_path(Path(checkpoint))}, which lies elsewhere"
    raise ConfigError(
        f"{key}={display_path(directory)} holds another run already ({_shorten(results)}){found}: name another "
        "directory, or go on with that run by ckpt_path"
    )


def is_within(checkpoint: str | None, directory: Path) -> bool:
    """Returns True if ``checkpoint`` is a path in ``directory``; links are followed."""
    return checkpoint is not None and Path(checkpoint).resolve().is_relative_to(directory.resolve())


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return printable(", ".join(names[:_SHOWN]) + more)
