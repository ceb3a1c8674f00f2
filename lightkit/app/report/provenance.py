"""Where a run comes from and where its files are: the command line, the commit and links, for the report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightkit.app.pages.document import escape, link
from lightkit.app.runs.differences import differing_keys
from lightkit.app.runs.siblings import find_siblings
from lightkit.app.runs.summary import REPORT, RunSummary, read_summary
from lightkit.app.runs.sweep_page import SWEEP_PAGE
from lightkit.errors import DataError

# The files and directories of a run that the report links to, beside its checkpoints.
_LINKED = ("compressed/report.html", "tensorboard", "metrics.csv", "metrics.json", "config.yaml", "train.log")

# The number of checkpoints that are linked, and of differences that describe a run in the legend.
_MAX_CHECKPOINTS = 6
_MAX_DIFFERENCES = 4

# The number of directories above a job in which the page of its sweep is searched.
_MAX_LEVELS = 3


def facts(run_dir: Path, environment: dict[str, Any], siblings: Sequence[RunSummary]) -> str:
    """Returns rows of an HTML table: command line, commit, files, and other runs.

    Args:
        run_dir: the directory of the run.
        environment: the content of ``environment.json``.
        siblings: the runs that the page shows beside the run.
    """
    rows = {
        "command": _command(run_dir),
        "commit": _commit(environment.get("git")),
        "checkpoints": _links(run_dir, _checkpoints(run_dir)),
        "files": _links(run_dir, [name for name in _LINKED if (run_dir / name).exists()]),
        "sweep": _sweep_link(run_dir),
        "other runs": ", ".join(_sibling_link(run_dir, run) for run in siblings),
    }
    return "".join(f"<tr><td>{name}</td><td>{content}</td></tr>" for name, content in rows.items() if content)


def describe_siblings(run_dir: Path, limit: int) -> list[tuple[RunSummary, str]]:
    """Returns the runs beside a run, each with the settings in which it differs from the run as a text.

    Args:
        run_dir: the directory of the run.
        limit: the largest number of runs.
    """
    try:
        own = read_summary(run_dir.absolute())
    except DataError:
        return []
    described = []
    for run in find_siblings(run_dir, limit):
        different = [f"{key}={values[1]}" for key, values in differing_keys([own, run]).items()]
        more = f" and {len(different) - _MAX_DIFFERENCES} more" if len(different) > _MAX_DIFFERENCES else ""
        described.append((run, ", ".join(different[:_MAX_DIFFERENCES]) + more or "the same configuration"))
    return described


def _command(run_dir: Path) -> str:
    try:
        run = read_summary(run_dir.absolute())
    except DataError:
        return ""
    if not run.config:
        # A program has called the job itself.
        return ""
    return f"<code>{escape(' '.join(['python -m lightkit.train', *map(shlex.quote, run.overrides)]))}</code>"


def _commit(git: Any) -> str:
    if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
        return ""
    branch = f" on {git['branch']}" if git.get("branch") else ""
    dirty = ", with changes that are not committed" if git.get("is_dirty") else ""
    return f"<code>{escape(git['commit'])}</code>{escape(branch + dirty)}"


def _checkpoints(run_dir: Path) -> list[str]:
    found = sorted((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: (path.name != "best.ckpt", path.name))
    return [f"checkpoints/{path.name}" for path in found[:_MAX_CHECKPOINTS] if path.name[0] != "."]


def _links(run_dir: Path, paths: list[str]) -> str:
    return ", ".join(link(path + ("/" if (run_dir / path).is_dir() else ""), path) for path in paths)


def _sweep_link(run_dir: Path) -> str:
    # The directory of a job may lie some levels below that of its sweep.
    for level, directory in enumerate(list(run_dir.absolute().parents)[:_MAX_LEVELS], start=1):
        if (directory / SWEEP_PAGE).is_file():
            return link("../" * level + SWEEP_PAGE, directory.name)
    return ""


def _sibling_link(run_dir: Path, run: RunSummary) -> str:
    has_report = (run.directory / REPORT).is_file()
    path = os.path.relpath(run.directory / REPORT, run_dir.absolute()) if has_report else ""
    return link(path, run.directory.name) if has_report else f"{escape(run.directory.name)} ({run.state})"
