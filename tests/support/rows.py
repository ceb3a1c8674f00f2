"""Tables of rows for tests: public data of scikit-learn and statsmodels as CSV files, and small ones made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def public_frame(name: str) -> Any:
    """Returns a data set of scikit-learn as a DataFrame with the column ``target``, the names of classes as texts."""
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")(as_frame=True)
    frame = found.frame.copy()
    if name != "diabetes":
        frame["target"] = [str(found.target_names[label]) for label in frame["target"]]
    return frame


def write_public(path: Path, name: str) -> Path:
    """Writes a data set of scikit-learn as pandas writes it: the first column, without a name, numbers the rows."""
    public_frame(name).to_csv(path)
    return path


def write_rows(path: Path, header: str, rows: Sequence[str]) -> Path:
    """Writes a CSV file of these lines."""
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def write_customers(path: Path, rows: int = 200, seed: int = 0, target: bool = True) -> Path:
    """Writes rows with numbers, gaps, categories, codes and dates, of which three columns decide the target.

    The columns are ``id``, ``age`` with gaps, ``plan``, ``region`` with gaps, ``postcode``, ``since``, ``country``,
    which is constant, and ``remark``, which is different in each row.
    """
    generator = np.random.default_rng(seed)
    lines = []
    for row in range(rows):
        age = int(generator.integers(18, 80))
        plan = ("basic", "plus", "pro")[generator.integers(3)]
        region = ("north", "south", "")[generator.integers(3)]
        postcode = f"0{generator.integers(1000, 1004)}"
        since = f"20{generator.integers(10, 24)}-{generator.integers(1, 13):02d}-15"
        cells = [row + 1, age if row % 10 else "", plan, region, postcode, since, "DE", f"remark {row}"]
        leaves = (plan == "basic") != (age > 50) if row % 10 else plan == "basic"
        lines.append(",".join(map(str, [*cells, *(["yes" if leaves else "no"] if target else [])])))
    header = "id,age,plan,region,postcode,since,country,remark" + (",leaves" if target else "")
    return write_rows(path, header, lines)
