"""A CSV logger whose file has only whole rows at any time, and which can continue the file of a resumed run."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightkit._util.atomic_write import write_atomically
from lightkit._util.csv_rows import read_rows

__all__ = ["CSVLogger", "read_rows"]

Rows = list[dict[str, Any]]


class CSVLogger(loggers.CSVLogger):
    """Lightning's ``CSVLogger``, except that a kill or a full disk loses no row that is in the file already.

    The logger appends whole rows. For a new column it writes a new file and replaces the old one by a rename. Rows that
    were logged since the last ``save`` are in memory only, and a kill loses them. The directory must be local.

    The logger removes an existing ``metrics.csv`` of its directory at the first access to `experiment`. A resumed run
    calls `continue_from` before, which keeps the rows.

    Args:
        *arguments: the positional arguments of Lightning's ``CSVLogger``.
        **options: the keyword arguments of Lightning's ``CSVLogger``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rows: Rows = []

    @rank_zero_only
    def continue_from(self, path: Path, steps: int, last: dict[str, Any] | None = None) -> None:
        """Starts the file of this logger with the rows of the first ``steps`` steps in ``path``.

        The method writes the rows at once, so that no checkpoint lies beside a log without the rows of its steps.

        Args:
            path: a ``metrics.csv`` of another logger, or this logger's own; without a valid file the log starts empty.
            steps: the number of finished steps. The method drops later rows, since the run will log them again.
            last: the metrics of the last finished step by name. The method adds them if the file lacks them, as after a
                kill; None adds nothing.
        """
        self._rows = [row for row in read_rows(path) if int(row["step"]) < steps]
        if last and not any(all(row.get(name) for name in last) for row in self._rows if int(row["step"]) == steps - 1):
            self._rows.append({**last, "step": steps - 1})
        self._experiment = None
        _ = self.experiment

    @property
    @rank_zero_experiment
    def experiment(self) -> _Writer:
        """The writer of ``metrics.csv``, which the first access makes."""
        writer = self._experiment
        if not isinstance(writer, _Writer):
            os.makedirs(self.log_dir, exist_ok=True)
            writer = self._experiment = _Writer(self.log_dir, self._rows)
        return writer


class _Writer(ExperimentWriter):
    """A writer of ``metrics.csv`` by which the file has whole rows at any time.

    The writer appends rows to the file; it replaces the file if a row has a new column or if the file is missing.

    Args:
        log_dir: the directory of the file.
        rows: the rows that the file begins with; an empty list removes an existing file.
    """

    def __init__(self, log_dir: str, rows: Rows) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        self._saved_hparams: dict[str, Any] = {}
        if rows:
            self.metrics_keys = sorted(set().union(*rows))
            self._replace(rows)
        else:
            self._path.unlink(missing_ok=True)

    def save(self) -> None:
        """Writes the rows that were logged since the last call, and the hyperparameters to ``hparams.yaml``."""
        if self.hparams != self._saved_hparams:
            save_hparams_to_yaml(str(self._path.with_name(self.NAME_HPARAMS_FILE)), self.hparams)
            self._saved_hparams = dict(self.hparams)
        if not self.metrics:
            return
        if self._record_new_keys() or not self._path.exists():
            self._replace([*read_rows(self._path), *self.metrics])
        else:
            self._append(self.metrics)
        self.metrics = []

    def _check_log_dir_exists(self) -> None:
        """Keeps an existing file, which Lightning's writer would remove."""

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
                # A full disk has taken a part of the rows.
                file.truncate(before)
                raise
