"""The rows of ``metrics.csv``: no kill, full disk or new column loses one."""

from __future__ import annotations

import errno

import pytest

from lightkit.loggers import CSVLogger, read_rows
from lightkit.loggers import csv_logger as loggers


def logger_in(directory):
    return CSVLogger(directory, name="", version="")


def log(logger, *values):
    for step, value in values:
        logger.log_metrics({"x": value}, step)
    logger.save()


def test_goes_on_with_the_rows_of_another(tmp_path):
    """The rows of the first steps are written at once, new rows after them; columns may differ."""
    log(logger_in(tmp_path / "a"), (0, 0.5), (1, 0.25), (2, 0.125))
    on = logger_in(tmp_path / "b")
    on.continue_from(tmp_path / "a" / "metrics.csv", steps=2)
    assert (tmp_path / "b" / "metrics.csv").read_text().split() == ["step,x", "0,0.5", "1,0.25"]
    log(on, (2, 1.0))
    on.log_metrics({"y": 2.0}, 3)
    on.save()
    assert (tmp_path / "b" / "metrics.csv").read_text().split() == [
        "step,x,y",
        *("0,0.5,", "1,0.25,", "2,1.0,", "3,,2.0"),
    ]
    # The log may be in its own directory.
    again = logger_in(tmp_path / "b")
    again.continue_from(tmp_path / "b" / "metrics.csv", steps=3)
    log(again, (3, 7.0))
    assert [row["x"] for row in read_rows(tmp_path / "b" / "metrics.csv")] == ["0.5", "0.25", "1.0", "7.0"]


def test_begins_anew_otherwise(tmp_path):
    """A log without a predecessor removes the file of an earlier run in its directory."""
    log(logger_in(tmp_path), (0, 0.5))
    log(logger_in(tmp_path), (0, 0.75))
    assert [row["x"] for row in read_rows(tmp_path / "metrics.csv")] == ["0.75"]


def test_a_row_that_a_kill_cut_short(tmp_path):
    """A truncated number is another number: the row is dropped and logged again."""
    log(logger_in(tmp_path), (0, 0.5), (1, 0.25))
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-3])
    assert [row["x"] for row in read_rows(path)] == ["0.5"]
    path.write_bytes(b"\xff\xfe")
    assert read_rows(path) == [] and read_rows(tmp_path / "none.csv") == []


def test_figures_of_the_last_step_come_once(tmp_path):
    """They are added only if a kill prevented them from being logged."""
    log(logger_in(tmp_path), (0, 0.5), (1, 0.25))
    for _ in range(2):
        on = logger_in(tmp_path)
        on.continue_from(tmp_path / "metrics.csv", 2, {"epoch": 0, "y": 3.0})
    assert [(row["step"], row["y"]) for row in read_rows(tmp_path / "metrics.csv")] == [
        ("0", ""),
        ("1", ""),
        ("1", "3.0"),
    ]


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    """A partial row is removed; a new column replaces the file as a whole or not at all."""
    logger, path = logger_in(tmp_path), tmp_path / "metrics.csv"
    log(logger, (0, 0.5))
    before = path.read_bytes()

    class Full:
        """A file that accepts three bytes."""

        def __init__(self, *arguments, **options):
            self._file, self._left = open(*arguments, **options), 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, content):
            if not self._left:
                raise OSError(errno.ENOSPC, "No space left")
            written, self._left = self._file.write(content[: self._left]), 0
            return written

    monkeypatch.setattr(loggers, "open", Full, raising=False)
    logger.log_metrics({"x": 0.25}, 1)
    with pytest.raises(OSError, match="No space left"):
        logger.save()
    assert path.read_bytes() == before
    monkeypatch.undo()
    logger.save()
    assert [row["x"] for row in read_rows(path)] == ["0.5", "0.25"]
