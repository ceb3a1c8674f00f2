"""The command ``python -m lightkit.runs``, which shows, compares and removes runs; and its functions for programs."""

from __future__ import annotations

from typing import NoReturn

from lightkit.app.runs.cleaning import Removal, find_removals, remove
from lightkit.app.runs.command import main
from lightkit.app.runs.comparison import Comparison, compare_runs, comparison_page
from lightkit.app.runs.listing import FoundRuns, find_runs, resolve_runs, select_runs, sort_runs
from lightkit.app.runs.summary import RunSummary, read_summary
from lightkit.app.runs.sweep_page import SweepSummary, read_sweep, sweep_page, write_sweep_page
from lightkit.runtime.command_process import run_as_process

__all__ = [
    "Comparison",
    "FoundRuns",
    "Removal",
    "RunSummary",
    "SweepSummary",
    "compare_runs",
    "comparison_page",
    "find_removals",
    "find_runs",
    "main",
    "read_summary",
    "read_sweep",
    "remove",
    "resolve_runs",
    "select_runs",
    "sort_runs",
    "sweep_page",
    "write_sweep_page",
]


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
