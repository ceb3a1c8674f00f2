"""The results of a cross-validation: the figures of each fold, their means and their standard deviations."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightkit._util import strict_json
from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.numbers import format_number
from lightkit._util.printable import printable
from lightkit.app.run_records import CONFIG, ENVIRONMENT, METRICS, REPORT

# The file with the results, in the directory of the run.
FOLDS = "folds.json"

# The first parts of the names of the metrics that the table shows.
_SHOWN = ("val/", "test/", "baseline/")


def directory_name(index: int) -> str:
    """Returns the name of the directory of a fold within the directory of the run."""
    return f"fold_{index}"


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean of ``values``; NaN if one is NaN."""
    return sum(values) / len(values)


def standard_deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation of a sample, whose divisor is one less than the number of ``values``."""
    center = mean(values)
    return math.sqrt(sum((value - center) * (value - center) for value in values) / (len(values) - 1))


def write(run_dir: Path, config: DictConfig) -> None:
    """Writes ``folds.json``, ``metrics.json`` and ``report.html``, and prints a table.

    ``metrics.json`` has the means, so that it is read like that of a single training.

    Args:
        run_dir: the directory of the run, in which each fold has a directory with its ``metrics.json``.
        config: the configuration of the run.
    """
    folds = [_read(run_dir / directory_name(index) / METRICS) for index in range(config.kfold)]
    names = [name for name in folds[0] if all(name in fold for fold in folds)]
    values = {name: [fold[name] for fold in folds] for name in names}
    means = {name: mean(row) for name, row in values.items()}
    deviations = {name: standard_deviation(row) for name, row in values.items()}
    content = {
        "kfold": config.kfold,
        "mean": means,
        "standard_deviation": deviations,
        "folds": [{"directory": directory_name(index), "metrics": fold} for index, fold in enumerate(folds)],
    }
    for name, part in {FOLDS: content, METRICS: means}.items():
        write_text_atomically(run_dir / name, strict_json.dumps(part, indent=2) + "\n")
    write_text_atomically(run_dir / CONFIG, OmegaConf.to_yaml(config, resolve=True))
    environment = run_dir / directory_name(0) / ENVIRONMENT
    if environment.is_file():
        shutil.copyfile(environment, run_dir / ENVIRONMENT)
    page = _write_page(run_dir, values, means, deviations)
    _print(str(config.name), run_dir, values, page)


def _read(path: Path) -> dict[str, float]:
    """Returns the metrics that are numbers; null, which stands for no finite number, becomes NaN."""
    metrics = json.loads(path.read_text())
    metrics = {name: math.nan if value is None else value for name, value in metrics.items()}
    return {name: value for name, value in metrics.items() if type(value) in (int, float)}


def _shown(values: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: row for name, row in values.items() if name.startswith(_SHOWN)}


def _summary(row: Sequence[float]) -> str:
    return f"{format_number(mean(row))} ± {format_number(standard_deviation(row), 2)}"


def _print(title: str, run_dir: Path, values: dict[str, list[float]], page: Path | None) -> None:
    from lightkit.app.console import print_table

    rows = {name: f"{_summary(row)}  ({', '.join(map(format_number, row))})" for name, row in _shown(values).items()}
    rows["run"] = os.path.relpath(run_dir)
    if page is not None:
        rows["report"] = os.path.relpath(page)
    count = len(next(iter(values.values()), []))
    print_table(f"{title}: mean ± standard deviation of {count} folds (each fold)", rows)


def _write_page(
    run_dir: Path, values: dict[str, list[float]], means: dict[str, Any], deviations: dict[str, float]
) -> Path | None:
    """Writes ``report.html`` with the table of the folds and links to their reports; returns None if it fails."""
    try:
        from lightkit.app.report import page
        from lightkit.app.report.section import Section

        content = page.render(run_dir, means, [Section("Folds", html=_table(run_dir, values))])
    except Exception as error:
        # The figures are on the disk, and the trainings must not end in an error.
        warnings.warn(f"no report of the folds: {type(error).__name__}: {error}", stacklevel=2)
        return None
    write_text_atomically(run_dir / REPORT, content)
    return run_dir / REPORT


def _table(run_dir: Path, values: dict[str, list[float]]) -> str:
    """Returns the table of the folds as HTML."""
    import html

    count = len(next(iter(values.values()), []))
    heads = ["metric", "mean ± standard deviation", *(_link(run_dir, index) for index in range(count))]
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    for name, row in _shown(values).items():
        cells = [html.escape(printable(name)), _summary(row), *map(format_number, row)]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _link(run_dir: Path, index: int) -> str:
    """Returns the name of a fold, as a link to its report if there is one."""
    name = directory_name(index)
    target = f"{name}/{REPORT}"
    return f'<a href="{target}">{name}</a>' if (run_dir / target).is_file() else name
