"""A logger whose ``metrics.csv`` is whole at any time, and goes on where the run that is continued had come to."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightkit._util.atomic_write import write_atomically

Rows = list[dict[str, Any]]


class CSVLogger(loggers.CSVLogger):
    """Lightning's ``CSVLogger`` for local directories, which loses no rows.

    Rows are appended whole, and the file is replaced in one rename where a new column makes it be written anew. A kill
    or a full disk leaves the rows that were there.

    Args: those of Lightning's logger.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rows: Rows = []

    @rank_zero_only
    def continue_from(self, path: Path, steps: int, last: dict[str, Any] | None = None) -> None:
        """Lets the log begin with the rows of another one, or with its own, that belong to the first steps.

        They are written at once, before a checkpoint can lie beside a log that lacks them.

        Args:
            path: a ``metrics.csv``; if it is not there, or is none, the log begins without a row.
            steps: how many steps are done; rows of later ones will be logged again.
            last: figures of the last of these steps, which a kill may have kept from being logged.
        """
        self._rows = [row for row in read_rows(path) if int(row["step"]) < steps]
        if last and not any(all(row.get(name) for name in last) for row in self._rows if int(row["step"]) == steps - 1):
            self._rows.append({**last, "step": steps - 1})
        self._experiment = None
        _ = self.experiment

    @property
    @rank_zero_experiment
    def experiment(self) -> _Writer:
        """The writer of the file, which Lightning's logger has under this name too."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _Writer(self.log_dir, self._rows)
        return self._experiment


def read_rows(path: Path) -> Rows:
    """Reads the rows of a ``metrics.csv`` by column, as texts: those that were written to their end.

    Returns:
        No rows if there is no such file, or it is not one that a logger wrote.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return []
    # What was not written to the end of its line may be half a number.
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    return [row for row in rows if (row.get("step") or "").isdecimal() and None not in row and None not in row.values()]


class _Writer(ExperimentWriter):
    """Writes ``metrics.csv``: whole rows at its end, or all of it anew."""

    def __init__(self, log_dir: str, rows: Rows) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        if rows:
            self.metrics_keys = sorted(set().union(*rows))
            self._replace(rows)
        else:
            self._path.unlink(missing_ok=True)

    def save(self) -> None:
        """Writes the rows that were logged since the last time."""
        if not self.metrics:
            return
        if self._record_new_keys() or not self._path.exists():
            self._replace([*read_rows(self._path), *self.metrics])
        else:
            self._append(self.metrics)
        self.metrics = []

    def _check_log_dir_exists(self) -> None:
        """Lets what lies there lie: Lightning's writer removes the rows of before."""

    def _csv(self, rows: Rows, with_header: bool = False) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        if with_header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def _replace(self, rows: Rows) -> None:
        write_atomically(self._path, lambda stream: stream.write(self._csv(rows, with_header=True)))

    def _append(self, rows: Rows) -> None:
        content = self._csv(rows)
        with open(self._path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
            except OSError:
                # A full disk has taken a part of them.
                file.truncate(before)
                raise
