"""The encoding of a table: all that a training has found, with which any later table becomes the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit._util.printable import few, printable
from lightkit.data.tables import Table
from lightkit.data.tables.numbers import AmbiguousMark
from lightkit.data.tables.times import AmbiguousDay
from lightkit.data.tabular.columns import MAX_TEXT, ColumnKind, RawColumn, listed, read_column, unique_names
from lightkit.data.tabular.features import MAX_ALL_CATEGORIES, Feature
from lightkit.data.tabular.targets import MAX_CLASSES, encode_labels
from lightkit.errors import DataError

# A checkpoint keeps the features, and the configuration of its model has a size for each category.
MAX_FEATURES = 5000

_KEYS = ("target", "classes", "features", "decimal", "day_first")


@dataclass(frozen=True)
class TableEncoding:
    """The features and the target of a table, and the statistics of the training part.

    Attributes:
        target: the name of the column of the target.
        classes: the names of the classes; None for a regression.
        features: the features in the order of the model's inputs.
        decimal: the decimal mark of the training table where it was found, for a later table that leaves it open.
        day_first: the order of day and month of the training table, likewise.
    """

    target: str
    classes: tuple[str, ...] | None
    features: tuple[Feature, ...]
    decimal: str | None = None
    day_first: bool | None = None

    @property
    def input_size(self) -> int:
        """The count of numbers that a row becomes."""
        return sum(feature.width for feature in self.features)

    @property
    def category_sizes(self) -> list[int]:
        """The number of indices of each category."""
        return [feature.num_categories for feature in self.features if feature.kind == "category"]

    def encode(self, table: Table) -> tuple[Tensor, Tensor, list[str]]:
        """Returns the rows of a table as numbers float32 ``(R, F)`` and categories int64 ``(R, K)``, and notes.

        The columns are found by their names; the table may have others, in any order.

        Raises:
            DataError: a column is missing, or a cell has no number where the training had numbers.
        """
        names = unique_names(table)
        if missing := [feature.name for feature in self.features if feature.name not in names]:
            raise DataError(
                f"{table.path} has no column {few(missing)}, from which the model predicts; it has "
                f"{printable(listed(names))}"
            )
        # An ensemble encodes a column for each of its models.
        raws: dict[tuple[str, ColumnKind], RawColumn] = {}
        for feature in self.features:
            key = feature.name, feature.kind
            if key not in raws:
                raws[key] = self.read(table, names.index(feature.name), *key)
        return self.encode_columns([raws[feature.name, feature.kind] for feature in self.features])

    def encode_columns(self, raws: Sequence[RawColumn]) -> tuple[Tensor, Tensor, list[str]]:
        """Returns the columns of the features as numbers and categories, and notes: see `encode`."""
        rows = len(raws[0].values) if raws else 0
        numbers: list[np.ndarray] = [np.empty((rows, 0), dtype=np.float32)]
        categories: list[np.ndarray] = []
        notes: list[str] = []
        for feature, raw in zip(self.features, raws, strict=True):
            if feature.kind != "category":
                numbers.append(feature.encode_numbers(raw))
                continue
            indices, unknown = feature.encode_categories(raw)
            categories.append(indices)
            if unknown:
                cells = "1 cell is" if len(unknown) == 1 else f"{len(unknown):,} cells are"
                found = few(sorted(set(unknown)))
                notes.append(f"{feature.name}: {cells} unknown to the model or rare in its training ({found})")
        stacked = np.stack(categories, axis=1) if categories else np.empty((rows, 0), dtype=np.int64)
        return torch.from_numpy(np.concatenate(numbers, axis=1)), torch.from_numpy(stacked), list(dict.fromkeys(notes))

    def encode_target(self, table: Table, raw: RawColumn) -> Tensor:
        """Returns labels int64 ``(R)``, or targets float64 ``(R)``.

        Args:
            table: the table, for messages.
            raw: the column of the target without gaps.

        Raises:
            DataError: a cell is none of the classes.
        """
        if self.classes is not None:
            return torch.from_numpy(encode_labels(raw, self.classes, table))
        return torch.from_numpy(raw.values[:, 0].copy())

    def read(self, table: Table, index: int, name: str, kind: ColumnKind) -> RawColumn:
        """Reads a column as the training did; marks and dates that a table leaves open are those of the training."""
        try:
            return read_column(table, index, name, kind)
        except DataError as error:
            if not isinstance(error.__cause__, (AmbiguousMark, AmbiguousDay)):
                raise
            return read_column(table.assume(self.decimal, self.day_first), index, name, kind)

    def to_plain(self) -> dict[str, Any]:
        """Returns the encoding as plain containers, for a checkpoint."""
        return {
            "target": self.target,
            "classes": None if self.classes is None else list(self.classes),
            "features": [feature.to_plain() for feature in self.features],
            "decimal": self.decimal,
            "day_first": self.day_first,
        }

    @classmethod
    def from_plain(cls, node: Any) -> TableEncoding:
        """Returns the encoding of plain containers of an untrusted checkpoint.

        Raises:
            DataError: the containers are not those of `to_plain`, or exceed a limit.
        """
        if type(node) is not dict or node.keys() != set(_KEYS):
            raise DataError("the state of a table, which says how its columns are encoded, has not lightkit's entries")
        classes, features = node["classes"], node["features"]
        is_valid = (
            type(node["target"]) is str
            and (classes is None or _are_texts(classes, MAX_CLASSES))
            and type(features) is list
            and 0 < len(features) <= MAX_FEATURES
            and node["decimal"] in (None, ".", ",")
            and node["day_first"] in (None, True, False)
        )
        if not is_valid:
            raise DataError("the state of a table has values that lightkit does not write")
        built = tuple(map(Feature.from_plain, features))
        if len({feature.name for feature in built}) < len(built):
            raise DataError("the state of a table has a feature twice")
        if sum(len(feature.categories) for feature in built) > MAX_ALL_CATEGORIES:
            raise DataError(f"the state of a table has more than {MAX_ALL_CATEGORIES:,} categories")
        return cls(
            node["target"], None if classes is None else tuple(classes), built, node["decimal"], node["day_first"]
        )


def _are_texts(values: Any, most: int) -> bool:
    return (
        type(values) is list
        and 1 < len(values) <= most
        and all(type(value) is str and len(value) <= MAX_TEXT for value in values)
        and len(set(values)) == len(values)
    )
