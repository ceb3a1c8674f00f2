"""Removes runs that came to nothing, and the checkpoints of all runs except the best ones.

Only files that lightkit writes are removed, since a run may have been told to write to a directory with other files. A
run is locked while it is removed: a running one is never touched.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightkit._util.directory_lock import hold, is_held, release
from lightkit.app.runs.listing import sort_runs
from lightkit.app.runs.summary import LOG, MARK, METRICS, REPORT, RunSummary
from lightkit.errors import ConfigError

# What a run writes into its directory, besides checkpoints and figures.
_FILES = (METRICS, LOG, REPORT, "config.yaml", "environment.json", "train.log")
_FIGURES = (
    *("learning_curves.png", "confusion_matrix.png", "mistakes.png", "forecasts.png", "error_by_step.png"),
    *("bits_per_byte.png", "by_position.png"),
)
_DIRECTORIES = (MARK, "tensorboard")


@dataclass(frozen=True)
class Removal:
    """Files of a run that can be removed.

    Args:
        run: the run.
        why: the reason, such as ``failed``.
        paths: the files and directories.
        size: their size in bytes.
    """

    run: RunSummary
    why: str
    paths: list[Path]
    size: int


def find_removals(
    runs: Sequence[RunSummary],
    states: Collection[str] = (),
    empty: bool = False,
    keep_checkpoints: int | None = None,
    metric: str | None = None,
) -> list[Removal]:
    """Returns what can be removed; nothing of a running run, and nothing below the directory of a running sweep.

    Args:
        runs: the runs to choose from.
        states: remove whole runs of these states: ``failed``, ``killed``.
        empty: remove whole runs that have neither ended nor written a checkpoint.
        keep_checkpoints: remove the checkpoints of finished runs, except those of so many best runs of each name; None
            removes none.
        metric: the metric that says which runs are best; None takes the objective of the runs.

    Raises:
        ConfigError: ``states`` has another state, ``keep_checkpoints`` is negative, or runs have no such metric.
    """
    if wrong := set(states) - {"failed", "killed"}:
        raise ConfigError(f"runs that are {wrong.pop()} are not removed: failed and killed ones may be")
    if keep_checkpoints is not None and keep_checkpoints < 0:
        raise ConfigError(f"keep_checkpoints must be 0 or more, got {keep_checkpoints}")
    removals: list[Removal] = []
    finished: dict[str, list[RunSummary]] = defaultdict(list)
    for run in runs:
        if _is_in_use(run):
            continue
        if run.state == "finished":
            finished[run.name].append(run)
        elif run.state in states:
            removals.append(_removal(run, run.state, list(_all_paths(run.directory))))
        elif empty and not _checkpoints(run.directory):
            removals.append(_removal(run, "empty", list(_all_paths(run.directory))))
    if keep_checkpoints is not None:
        for same in finished.values():
            key = metric or next((run.objective for run in same if run.objective in run.metrics), None)
            if key is None and len(same) > keep_checkpoints:
                raise ConfigError(f"the runs of {same[0].name} have no objective: name a metric")
            for run in sort_runs(same, key)[keep_checkpoints:] if key is not None else []:
                if paths := _checkpoints(run.directory):
                    removals.append(_removal(run, f"not among the best {keep_checkpoints}", paths))
    return removals


def remove(removal: Removal) -> list[str]:
    """Removes files of a run, and its directory if nothing else is in it.

    Returns:
        The names of other files that the directory still has; empty if the directory is gone.

    Raises:
        ConfigError: the run is running by now.
        OSError: a file cannot be removed.
    """
    directory = removal.run.directory
    if _is_in_use(removal.run) or not hold(directory):
        raise ConfigError(f"{directory} is running: nothing of it was removed")
    try:
        for path in removal.paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for place in (directory / "checkpoints", directory):
            with suppress(OSError):
                place.rmdir()
        return sorted(os.listdir(directory)) if directory.exists() else []
    finally:
        release(directory)


def _removal(run: RunSummary, why: str, paths: list[Path]) -> Removal:
    return Removal(run, why, paths, sum(map(_size, paths)))


def _is_in_use(run: RunSummary) -> bool:
    """Returns True if a process holds the directory of a run, or one above it, as a sweep does."""
    directory = run.directory.absolute()
    return any(is_held(place) for place in (directory, *list(directory.parents)[:2]))


def _all_paths(directory: Path) -> Iterator[Path]:
    for name in (*_FILES, *_FIGURES, *_DIRECTORIES):
        if (directory / name).exists():
            yield directory / name
    yield from _checkpoints(directory)


def _checkpoints(directory: Path) -> list[Path]:
    folders = [directory, directory / "checkpoints"]
    # A link may lead to checkpoints that are not the run's.
    found = [path for folder in folders if not folder.is_symlink() for path in folder.glob("*.ckpt")]
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def _size(path: Path) -> int:
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(_size(Path(entry.path)) for entry in os.scandir(path))
        return path.lstat().st_size
    except OSError:
        return 0
