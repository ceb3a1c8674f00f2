"""Finds the runs below a directory, and chooses among them."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightkit._util.printable import printable
from lightkit.app.runs.summary import MARK, STATES, RunSummary, larger_is_better, read_summary
from lightkit.errors import ConfigError, DataError

# Directories of a run that hold no other run.
_WITHOUT_RUNS = {"checkpoints", "tensorboard"}

# The metrics of a test that a table prefers, in this order, and the number of metrics that it shows.
_PREFERRED = ("test/accuracy", "test/mae", "test/bits_per_byte", "test/loss", "val/accuracy", "val/loss")
_SHOWN_METRICS = 3

# The key figures of a compression, which a table shows as well.
_COMPRESSION = ("compression/macs_left", "compression/zipped_bytes")

# What runs can be sorted by besides metrics.
_SORT_KEYS = ("started", "name")


@dataclass(frozen=True)
class FoundRuns:
    """The runs below a directory.

    Args:
        runs: the runs, the newest first.
        skipped: for each run whose record is damaged a line that says so.
    """

    runs: list[RunSummary]
    skipped: list[str]


def find_runs(root: str | Path = "runs") -> FoundRuns:
    """Finds the runs at and below a directory; links are not followed.

    Args:
        root: the directory.

    Raises:
        ConfigError: there is no such directory.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"there is no directory {printable(str(root))}; --root names that of the runs")
    runs, skipped = [], []
    for directory in _run_directories(root):
        try:
            runs.append(read_summary(directory))
        except DataError as error:
            skipped.append(printable(str(error)))
    return FoundRuns(sorted(runs, key=lambda run: run.started, reverse=True), sorted(skipped))


def select_runs(
    runs: Sequence[RunSummary],
    name: str | None = None,
    states: Collection[str] = (),
    tags: Collection[str] = (),
) -> list[RunSummary]:
    """Returns the runs that fit every condition.

    Args:
        runs: the runs.
        name: the name of the job, or a pattern with ``*`` and ``?``; None for every name.
        states: the states that a run may have; empty for every state.
        tags: the tags that a run must have, all of them.

    Raises:
        ConfigError: ``states`` has a state that does not exist.
    """
    if unknown := [state for state in states if state not in STATES]:
        raise ConfigError(f"state {unknown[0]!r} is none of {', '.join(STATES)}")
    return [
        run
        for run in runs
        if (name is None or fnmatch.fnmatchcase(run.name, name))
        and (not states or run.state in states)
        and set(tags) <= set(run.tags)
    ]


def sort_runs(runs: Sequence[RunSummary], key: str) -> list[RunSummary]:
    """Returns the runs in the order of a metric, the best first; runs without the metric come last.

    Args:
        runs: the runs.
        key: the name of the metric, or ``started`` (the newest first) or ``name``.

    Raises:
        ConfigError: no run has such a metric.
    """
    if key == "name":
        return sorted(runs, key=lambda run: run.name)
    if key == "started":
        return sorted(runs, key=lambda run: run.started, reverse=True)
    values = [run.value(key) for run in runs]
    if runs and all(value is None for value in values):
        known = ", ".join(sorted({name for run in runs for name in run.metrics})[:20])
        raise ConfigError(f"no run has the metric {key!r}; there are {', '.join(_SORT_KEYS)}, {printable(known)}")
    sign = -1 if larger_is_better(key, runs[0].config if runs else None) else 1
    return sorted(runs, key=lambda run: ((value := run.value(key)) is None, 0 if value is None else sign * value))


def resolve_runs(words: Sequence[str], root: str | Path = "runs") -> list[RunSummary]:
    """Returns the runs that words name: a directory, or the end of the path of one run below ``root``.

    Raises:
        ConfigError: a word names no run, or several.
        DataError: the record of a run is damaged.
    """
    directories = list(_run_directories(Path(root))) if Path(root).is_dir() else []
    found = []
    for word in words:
        if (Path(word) / MARK).is_dir():
            found.append(read_summary(Path(word)))
            continue
        parts = Path(word).parts
        matching = [directory for directory in directories if parts and directory.parts[-len(parts) :] == parts]
        if len(matching) != 1:
            several = ", ".join(str(path) for path in matching[:3])
            cause = f"names several runs: {several}" if matching else f"names no run below {root}"
            raise ConfigError(printable(f"{word!r} {cause}; a run is named by its directory"))
        found.append(read_summary(matching[0]))
    return found


def choose_metrics(runs: Sequence[RunSummary], limit: int = _SHOWN_METRICS) -> list[str]:
    """Returns the names of the metrics that say most about runs: their objective, and those of the test.

    Args:
        runs: the runs.
        limit: the largest number of names, without those of a compression.
    """
    counts = Counter(name for run in runs for name in run.metrics)
    objectives = Counter(run.objective for run in runs if run.objective in run.metrics)
    wanted = [name for name, _ in objectives.most_common(1) if name is not None]
    # First what most runs have.
    preferred = sorted(_PREFERRED, key=lambda name: -counts[name] if name.startswith("test/") else 0)
    wanted += [name for name in preferred if counts[name]]
    return [*list(dict.fromkeys(wanted))[:limit], *(name for name in _COMPRESSION if counts[name])]


def _run_directories(root: Path) -> Iterator[Path]:
    pending = [root]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        if MARK in names:
            yield directory
        pending += [directory / name for name in names if name[0] != "." and name not in _WITHOUT_RUNS]
