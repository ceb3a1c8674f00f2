"""Prepares a table for a training: reads its columns, splits its rows, finds the encoding and encodes the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lightkit._util.printable import few, printable
from lightkit.data.advice import advise
from lightkit.data.folds import Fold
from lightkit.data.tables import Table
from lightkit.data.tabular.columns import RawColumn, find_column, listed, read_column, unique_names
from lightkit.data.tabular.encoding import MAX_FEATURES, TableEncoding
from lightkit.data.tabular.features import MAX_ALL_CATEGORIES, MAX_CATEGORIES, Feature, fit_feature
from lightkit.data.tabular.selection import unfit_reason
from lightkit.data.tabular.split import split_rows
from lightkit.data.tabular.targets import find_classes, read_target
from lightkit.errors import DataError


@dataclass(frozen=True)
class Wishes:
    """Holds what the user says of a table: see the arguments of `lightkit.data.TableDataModule`.

    Attributes:
        kind: the kind of the target; None finds it.
        columns: the names of the features; none stands for all that teach something.
        ignore: the names of columns that are no features.
        categories: the names of columns that are categories.
        time_column: the column of times in whose order the rows are split; None for none.
        sizes: the sizes of validation and test.
        split_seed: the seed of the split.
    """

    kind: str | None = None
    columns: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    time_column: str | None = None
    sizes: dict[str, float] = field(default_factory=dict)
    split_seed: int = 0


@dataclass(frozen=True)
class PreparedRows:
    """Encoded rows.

    Attributes:
        tensors: numbers float32 ``(R, F)``, categories int64 ``(R, K)``, and labels int64 or targets float64 ``(R)``.
        notes: what a user should know of them.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PreparedTable:
    """The parts of a table: ``train``, ``validation`` and ``test``."""

    encoding: TableEncoding
    parts: dict[str, PreparedRows]
    notes: list[str]


def prepare(
    table: Table,
    test: Table | None,
    target: str | None,
    wishes: Wishes,
    encoding: TableEncoding | None,
    fold: Fold | None = None,
) -> PreparedTable:
    """Returns the parts of a table, encoded.

    Args:
        table: the table.
        test: the table of the test; None takes the test from ``table``.
        target: the name of the column to predict.
        wishes: what the user says of the table.
        encoding: the encoding of an earlier training; None finds the encoding in the training part.
        fold: the fold that is the validation part; None takes the size of the wishes.

    Raises:
        DataError: a column or a cell cannot be used, or the rows are too few.
    """
    names = unique_names(table)
    if target is None:
        raise DataError(
            printable(f"{advise('target=COLUMN')} must name the column to predict; {table.path} has {listed(names)}")
        )
    index = find_column(names, target, table, "target")
    if encoding is None:
        raw = read_target(table, index, target, wishes.kind)
    else:
        raw = encoding.read(table, index, target, "number" if encoding.classes is None else "category")
    table, raw, notes = _without_gaps(table, raw)
    classes = encoding.classes if encoding is not None else None
    if encoding is None and raw.kind == "category":
        classes = find_classes(raw, table)
    shell = encoding or TableEncoding(target, classes, ())
    labels = shell.encode_target(table, raw)
    sizes = {name: size for name, size in wishes.sizes.items() if test is None or name != "test"}
    order = None if wishes.time_column is None else _time_order(table, names, wishes.time_column)
    mix = None if classes is None else labels.numpy()
    rows = split_rows(mix, len(table), sizes, wishes.split_seed, order, table, fold)
    _check_variation(labels[torch.from_numpy(rows["train"])], table, target)
    if encoding is None:
        columns, left_out = _choose_columns(table, names, target, wishes)
        features, constant = _fit_features(columns, rows["train"])
        left_out |= constant
        columns = [column for column in columns if column.name not in constant]
        if not features:
            raise DataError(f"{table.path} has no column from which {printable(target)} could be predicted")
        encoding = replace(shell, features=tuple(features), **_marks([raw, *columns]))
        if left_out:
            notes.append(f"left out: {listed([f'{name} ({reason})' for name, reason in left_out.items()])}")
        numbers, categories, _ = encoding.encode_columns(columns)
    else:
        numbers, categories, _ = encoding.encode(table)
    parts = {
        name: PreparedRows((numbers[indices], categories[indices], labels[indices]))
        for name, indices in ((name, torch.from_numpy(part)) for name, part in rows.items())
    }
    if test is not None:
        parts["test"] = prepare_rows(test, encoding)
    counts = ", ".join(f"{len(part.tensors[0])} {name}" for name, part in parts.items())
    what = "a number" if classes is None else f"{len(classes)} classes"
    count = len(encoding.features)
    notes.append(f"predicts {target} ({what}) from {count} {'column' if count == 1 else 'columns'}; rows: {counts}")
    return PreparedTable(encoding, parts, notes)


def prepare_rows(table: Table, encoding: TableEncoding) -> PreparedRows:
    """Returns all rows of a later table that have a target, encoded.

    Raises:
        DataError: a column is missing, a cell cannot be used, or no row has a target.
    """
    index = find_column(unique_names(table), encoding.target, table, "target")
    kind = "number" if encoding.classes is None else "category"
    raw = encoding.read(table, index, encoding.target, kind)
    table, raw, notes = _without_gaps(table, raw)
    labels = encoding.encode_target(table, raw)
    numbers, categories, unknown = encoding.encode(table)
    return PreparedRows((numbers, categories, labels), [*notes, *unknown])


def _without_gaps(table: Table, raw: RawColumn) -> tuple[Table, RawColumn, list[str]]:
    """Returns the rows that have a target, and a note on the others."""
    gaps = raw.values == "" if raw.kind == "category" else np.isnan(raw.values[:, 0])
    kept = np.flatnonzero(~gaps)
    if len(kept) == 0:
        raise DataError(f"{table.path}, column {printable(raw.name)} has no value to predict")
    if len(kept) == len(table):
        return table, raw, []
    count = len(table) - len(kept)
    note = f"{count:,} {'row' if count == 1 else 'rows'} without a value of {raw.name} left out"
    return table.take(kept), replace(raw, values=raw.values[kept]), [note]


def _time_order(table: Table, names: Sequence[str], name: str) -> np.ndarray:
    times = table.times(find_column(names, name, table, "time_column"))
    return np.argsort(times.values, kind="stable")


def _check_variation(train: Tensor, table: Table, target: str) -> None:
    if len(train.unique()) < 2:
        raise DataError(f"{table.path}, column {printable(target)} does not vary in the {len(train)} rows of training")


def _choose_columns(
    table: Table, names: Sequence[str], target: str, wishes: Wishes
) -> tuple[list[RawColumn], dict[str, str]]:
    """Returns the columns that may be features, and for each other column why it is left out."""
    for setting in ("columns", "ignore", "categories"):
        for name in getattr(wishes, setting):
            find_column(names, name, table, setting)
            if name == target:
                raise DataError(f"{advise(setting)} has {printable(name)}, which is the target")
    if both := [name for name in wishes.ignore if name in (*wishes.columns, *wishes.categories)]:
        raise DataError(f"{advise('ignore')} has {few(both)}, which the model is to read")
    wanted = set(wishes.columns) or set(names) - {*wishes.ignore, target}
    columns: list[RawColumn] = []
    left_out: dict[str, str] = {}
    for index, name in enumerate(names):
        if name in wanted:
            column = read_column(table, index, name, "category" if name in wishes.categories else None)
            reason = unfit_reason(column)
            if reason is not None and (column.kind == "empty" or name not in (*wishes.columns, *wishes.categories)):
                left_out[name] = reason
            else:
                columns.append(column)
    if len(columns) > MAX_FEATURES:
        raise DataError(
            f"{table.path} has {len(columns):,} columns to predict from, and {MAX_FEATURES:,} at most are read: choose "
            f"them with {advise('columns=[NAME,...]')}"
        )
    return columns, left_out


def _fit_features(columns: Sequence[RawColumn], train: np.ndarray) -> tuple[list[Feature], dict[str, str]]:
    """Returns the features of columns; and the names of those that do not vary, each with that reason."""
    count = sum(column.kind == "category" for column in columns)
    most = min(MAX_CATEGORIES, MAX_ALL_CATEGORIES // max(1, count))
    fitted = {column.name: fit_feature(column, train, most) for column in columns}
    constant = {name: "constant" for name, feature in fitted.items() if feature is None}
    return [feature for feature in fitted.values() if feature is not None], constant


def _marks(columns: Sequence[RawColumn]) -> dict[str, str | bool | None]:
    """Returns the decimal mark and the order of day and month that the columns turned out to have."""
    notes = [note for column in columns for note in column.notes]
    order = next((note for note in notes if note.startswith("dates as ")), "")
    days = {"D": True, "M": False}.get(order.removeprefix("dates as ")[:1])
    return {"decimal": "," if "decimal commas" in notes else None, "day_first": days}
