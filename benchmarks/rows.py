"""Appends rows of measurements to results/NAME.csv, each with its machine and versions."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path
from typing import Any

import torch
from recorded import RESULTS

from lightkit.app.run_files import environment


def machine() -> dict[str, Any]:
    """Returns the day, the device, the number of threads and the versions of torch and Python."""
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
    """Appends rows, whose columns are those of the first one and of `machine`, and returns the path of the file."""
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
