"""The runs beside a run: those of the same name, or the other jobs of its sweep."""

from __future__ import annotations

import os
from pathlib import Path

from lightkit.app.runs.summary import LOG, RECORD, RunSummary, read_summary
from lightkit.errors import DataError

# The number of runs that a report shows beside its own, of directories that are looked at for them, and the largest log
# of such a run in bytes: a report is written in a moment, whatever lies there.
MAX_SIBLINGS = 7
_MAX_DIRECTORIES = 20_000
_MAX_LOG_BYTES = 4 << 20


def find_siblings(directory: Path, limit: int = MAX_SIBLINGS) -> list[RunSummary]:
    """Returns the newest other runs in the directory above a run that have the run's name and learning curves.

    Args:
        directory: the directory of the run.
        limit: the largest number of runs.
    """
    directory = directory.absolute()
    try:
        own = read_summary(directory)
        entries = []
        with os.scandir(directory.parent) as found:
            for _, entry in zip(range(_MAX_DIRECTORIES), found, strict=False):
                if entry.name != directory.name and entry.is_dir(follow_symlinks=False):
                    entries.append(entry)
        marks = sorted(((_changed(entry), entry.name) for entry in entries), reverse=True)
    except (OSError, DataError):
        return []
    siblings: list[RunSummary] = []
    for changed, name in marks:
        if len(siblings) == limit or not changed:
            break
        try:
            summary = read_summary(directory.parent / name)
            is_small = (summary.directory / LOG).stat().st_size <= _MAX_LOG_BYTES
        except (OSError, DataError):
            continue
        if is_small and (summary.name == own.name or (own.sweep is not None and summary.sweep == own.sweep)):
            siblings.append(summary)
    return sorted(siblings, key=lambda run: run.started, reverse=True)


def _changed(entry: os.DirEntry[str]) -> float:
    """Returns the time of the last change of a run's record; 0 for a directory without one."""
    try:
        return os.stat(os.path.join(entry.path, RECORD)).st_mtime
    except OSError:
        return 0.0
