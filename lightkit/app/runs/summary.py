"""The summary of a run, from the JSON and CSV files in its directory."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightkit._util.directory_lock import is_held
from lightkit.errors import DataError

State = Literal["running", "finished", "failed", "killed"]

STATES: tuple[State, ...] = ("running", "finished", "failed", "killed")

# The directory by which Hydra marks that of a run, and the names of the files in both.
MARK = ".hydra"
RECORD = Path(MARK) / "run.json"
METRICS, LOG, REPORT = "metrics.json", "metrics.csv", "report.html"

# The largest record that is read, and the end of a log in which its last values are searched, in bytes.
_MAX_RECORD_BYTES = 8 << 20
_LOG_END_BYTES = 1 << 16

# Words in the names of metrics of which a larger value is better.
_LARGER_IS_BETTER = {
    *("acc", "auc", "auroc", "ap", "bleu", "coverage", "dice", "f1", "f1score", "fbeta", "iou", "jaccard", "kappa"),
    *("map", "miou", "ndcg", "precision", "psnr", "r2", "recall", "reward", "rouge", "sensitivity", "specificity"),
    *("ssim", "second"),
}


@dataclass(frozen=True)
class RunSummary:
    """Holds what the files of a run tell without the run's program.

    Args:
        directory: the directory of the run.
        name: the name of the job; runs of one name lie below one directory.
        started: the time of the latest start, in seconds since the epoch.
        state: ``running`` while a process holds the directory, ``finished`` with a report, ``failed`` after an error,
            ``killed`` otherwise: ended by a signal or by Ctrl-C.
        metrics: the numbers in ``metrics.json`` by name; before the end of the run, the last ones in ``metrics.csv``.
        config: the configuration before interpolation.
        overrides: the run's overrides on the command line.
        tags: the tags that the configuration gives.
        sweep: the id of the sweep that the run belongs to; None for a single run.
        result: the objective that a sweeper got; None without one.
        error: the first line of the error that ended the run; None without one.
    """

    directory: Path
    name: str
    started: float
    state: State
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    sweep: str | None = None
    result: float | None = None
    error: str | None = None

    @property
    def objective(self) -> str | None:
        """The name of the metric that the configuration calls the objective; None without one."""
        name = self.config.get("objective")
        return name if isinstance(name, str) else None

    def value(self, metric: str) -> float | None:
        """Returns the number ``metric``; None if the run has none or it is NaN."""
        value = self.metrics.get(metric)
        return None if value is None or math.isnan(value) else value


def read_summary(directory: Path) -> RunSummary:
    """Reads the summary of the run in ``directory``.

    Raises:
        DataError: the record of the run is damaged; the message has the path.
    """
    record = _read_record(directory)
    config = record.get("config")
    config = config if isinstance(config, dict) else {}
    metrics = read_metrics(directory / METRICS)
    # The first edition of lightkit wrote no record, and the wall time just before the report.
    is_finished = record.get("is_finished") is True if record else "wall_seconds" in metrics
    error = record.get("error")
    error = error if isinstance(error, str) else None
    state: State = "finished" if is_finished else "failed" if error is not None else "killed"
    if not is_finished:
        # A run that goes on has removed the error from its record.
        state = "running" if error is None and is_held(directory) else state
        metrics = _last_logged(directory / LOG) | metrics
    name, job, result = config.get("name"), record.get("job"), record.get("result")
    return RunSummary(
        directory,
        name if isinstance(name, str) else directory.parent.name,
        _started(record, directory),
        state,
        metrics,
        config,
        _texts(record.get("overrides")),
        _texts(config.get("tags")),
        job if isinstance(job, str) else None,
        _number(result),
        error.partition("\n")[0] if error is not None else None,
    )


def read_metrics(path: Path) -> dict[str, float]:
    """Returns the numbers in the ``metrics.json`` at ``path`` by name, NaN for null; an empty dict if it is damaged."""
    content = _load(path)
    if not isinstance(content, dict):
        return {}
    numbers = {name: math.nan if value is None else _number(value) for name, value in content.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def larger_is_better(metric: str, config: Mapping[str, Any] | None = None) -> bool:
    """Returns True if the best value of a metric is the largest one.

    Args:
        metric: the name of the metric.
        config: a configuration, whose checkpoints may be chosen by the same metric; None for none.
    """
    callbacks = (config or {}).get("callbacks")
    checkpoint = callbacks.get("checkpoint") if isinstance(callbacks, dict) else None
    if (
        isinstance(checkpoint, dict)
        and checkpoint.get("monitor") == metric
        and checkpoint.get("mode") in ("min", "max")
    ):
        return checkpoint["mode"] == "max"
    name = metric.rpartition("/")[2].lower()
    return "accuracy" in name or not _LARGER_IS_BETTER.isdisjoint(re.split(r"[^a-z0-9]+", name))


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    if not path.exists():
        return {}
    content = _load(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it is no record of a run")
    return content


def _load(path: Path) -> Any:
    """Returns the content of a JSON file; None if it cannot be read."""
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES or not path.is_file():
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _started(record: dict[str, Any], directory: Path) -> float:
    started = _number(record.get("started"))
    # A date that no calendar has is no date.
    if started is not None and 0 <= started < 2**40:
        return started
    try:
        return (directory / MARK).stat().st_mtime
    except OSError:
        return 0.0


def _number(value: Any) -> float | None:
    """Returns ``value`` as a float; None if it is no number. NaN and infinities may be texts."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _last_logged(path: Path) -> dict[str, float]:
    """Returns the last value of each column of a ``metrics.csv``; columns without a value at its end are left out."""
    try:
        if not path.is_file():
            return {}
        with open(path, "rb") as file:
            header = file.readline(_LOG_END_BYTES).decode("utf-8", "replace")
            start = file.tell()
            size = file.seek(0, io.SEEK_END)
            file.seek(max(start, size - _LOG_END_BYTES))
            text = file.read(_LOG_END_BYTES).decode("utf-8", "replace")
            lines = text.split("\n")[1 if size - _LOG_END_BYTES > start else 0 : -1]
        names, *rows = csv.reader([header, *lines])
    except (OSError, ValueError, csv.Error):
        return {}
    found: dict[str, float] = {}
    for row in rows:
        for name, value in zip(names, row, strict=False):
            if value and name not in ("epoch", "step") and (number := _number(value)) is not None:
                found[name] = number
    return found
