"""Decides which columns of a table a model reads: a column that names or numbers the rows teaches nothing."""

from __future__ import annotations

import re

import numpy as np

from lightkit.data.tabular.columns import RawColumn

# Names of columns that identify a row if no value occurs twice.
_IDENTIFIER = re.compile(r"(.*[\s_.\-])?(id|ids|index|uuid|guid)|.*[a-z](Id|ID)", re.ASCII)

# A column of texts with more different ones has names or remarks if most of them are different.
_MAX_RARE = 20

# The number of rows from which on different values are no chance.
_MIN_ROWS = 3


def unfit_reason(raw: RawColumn) -> str | None:
    """Returns why a column is left out unless the user chooses it, such as ``numbers the rows``; None if it fits.

    Args:
        raw: the column.
    """
    if raw.kind == "empty":
        return "empty"
    if raw.kind == "category":
        return _unfit_texts(raw)
    values = raw.values[:, 0]
    if raw.kind == "date" or len(values) < _MIN_ROWS or np.isnan(values).any() or (values != np.rint(values)).any():
        return None
    if (values[:-1] + 1 == values[1:]).all():
        return "numbers the rows"
    is_named = _IDENTIFIER.fullmatch(raw.name) or _IDENTIFIER.fullmatch(raw.name.lower())
    return "identifies the rows" if is_named and len(np.unique(values)) == len(values) else None


def _unfit_texts(raw: RawColumn) -> str | None:
    present = [cell for cell in raw.values.tolist() if cell]
    different = len(set(present))
    if len(present) >= _MIN_ROWS and different == len(present):
        return "all different"
    if different > max(_MAX_RARE, len(present) / 2):
        return f"{different:,} different texts in {len(present):,} rows"
    return None
