"""Rows of measurements: appended to results/NAME.csv, each with its machine and versions."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path
from typing import Any

import torch

from lightkit.app.run_files import environment

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What a figure means nothing without."""
    facts = environment()
    device = ", ".join(facts["gpus"]) or facts["cpu"]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append(name: str, rows: list[dict[str, Any]]) -> Path:
    """Adds rows to a table, whose columns are those of its first row."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    facts = machine()
    complete = [{**row, **facts} for row in rows]
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(complete[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(complete)
    return path
