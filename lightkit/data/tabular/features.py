"""A feature: a column of a table, and how its cells become numbers or the index of a category."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from lightkit.data.tabular.columns import DATE_PARTS, MAX_TEXT, ColumnKind, RawColumn
from lightkit.errors import DataError

# The indices of categories that are not those of the training.
UNKNOWN, MISSING, _FIRST = 0, 1, 2

# The categories of a column that are kept, the most frequent ones, and those of all columns together.
MAX_CATEGORIES, MAX_ALL_CATEGORIES = 10_000, 100_000

# A later file may have any number; one that is further from the mean would make the outputs of a model infinite.
_MAX_DEVIATIONS = 1e6

# A category of fewer training rows is like an unknown one, so that the model learns what to make of unknown ones.
_MIN_ROWS = 2


@dataclass(frozen=True)
class Feature:
    """A column that the model reads, with what the training part says of it.

    Numbers, and each part of a date, become ``(value - center) / scale``; a gap becomes 0, the mean. With
    ``marks_gaps`` one more number is 1 for a gap and 0 for a value. A category becomes its index: 0 for an unknown
    one, 1 for a gap, and from 2 on those of ``categories``.

    Attributes:
        name: the name of the column.
        kind: ``"number"``, ``"date"`` or ``"category"``.
        parts: of a date, the names of the numbers that it becomes, among `columns.DATE_PARTS`.
        centers: the mean of each number in the training part.
        scales: the standard deviation of each number in the training part.
        marks_gaps: True if the training part has gaps in a column of numbers or dates.
        categories: the categories in the order of their indices.
    """

    name: str
    kind: ColumnKind
    parts: tuple[str, ...] = ()
    centers: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    marks_gaps: bool = False
    categories: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """The count of numbers that the column becomes; 0 for a category."""
        return len(self.centers) + int(self.marks_gaps)

    @property
    def num_categories(self) -> int:
        """The number of indices of a category, with those for unknown ones and gaps."""
        return len(self.categories) + _FIRST

    def encode_numbers(self, raw: RawColumn) -> np.ndarray:
        """Returns the numbers of a column that is no category, float32 ``(R, width)``."""
        values = self._chosen(raw.values)
        gaps = np.isnan(values[:, :1])
        with np.errstate(over="ignore"):
            standardised = (values - np.array(self.centers)) / np.array(self.scales)
        standardised[np.isnan(standardised)] = 0
        if self.marks_gaps:
            standardised = np.concatenate([standardised, gaps], axis=1)
        return standardised.clip(-_MAX_DEVIATIONS, _MAX_DEVIATIONS).astype(np.float32)

    def encode_categories(self, raw: RawColumn) -> tuple[np.ndarray, list[str]]:
        """Returns the indices of a column of categories, int64 ``(R)``, and the texts that are not among them."""
        places = {"": MISSING, **{name: index for index, name in enumerate(self.categories, start=_FIRST)}}
        indices = np.fromiter((places.get(cell, UNKNOWN) for cell in raw.values), np.int64, len(raw.values))
        return indices, raw.values[indices == UNKNOWN].tolist()

    def to_plain(self) -> dict[str, Any]:
        """Returns the feature as plain containers, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, node: Any) -> Feature:
        """Returns the feature of plain containers of an untrusted checkpoint.

        Raises:
            DataError: the containers are not those of `to_plain`.
        """
        names = ("name", "kind", "parts", "centers", "scales", "marks_gaps", "categories")
        if type(node) is not dict or node.keys() != set(names):
            raise DataError("a feature has other entries than lightkit's")
        lists = {name: node[name] for name in ("parts", "centers", "scales", "categories")}
        texts = [node["name"], *_listed(lists["parts"]), *_listed(lists["categories"])]
        numbers = [*_listed(lists["centers"]), *_listed(lists["scales"])]
        is_valid = (
            all(type(value) is list for value in lists.values())
            and all(type(text) is str for text in texts)
            and all(len(text) <= MAX_TEXT for text in texts[1:])
            and all(type(number) is float and np.isfinite(number) for number in numbers)
            and all(scale > 0 for scale in lists["scales"])
            and len(lists["centers"]) == len(lists["scales"])
            and type(node["marks_gaps"]) is bool
            and len(lists["categories"]) <= MAX_CATEGORIES
        )
        widths = {"number": ([], 1), "date": (lists["parts"], len(_listed(lists["parts"]))), "category": ([], 0)}
        parts, width = widths.get(node["kind"], (None, -1)) if type(node["kind"]) is str else (None, -1)
        is_valid = is_valid and (lists["parts"], len(lists["centers"])) == (parts, width)
        if not is_valid or not set(lists["parts"]) <= set(DATE_PARTS):
            raise DataError("a feature has values that lightkit does not write")
        found = {name: tuple(value) for name, value in lists.items()}
        kind = cast(ColumnKind, node["kind"])
        return cls(node["name"], kind, marks_gaps=node["marks_gaps"], **found)

    def _chosen(self, values: np.ndarray) -> np.ndarray:
        return values if self.kind == "number" else values[:, [DATE_PARTS.index(part) for part in self.parts]]


def fit_feature(raw: RawColumn, train: np.ndarray, max_categories: int = MAX_CATEGORIES) -> Feature | None:
    """Returns the feature of a column; None if the column does not vary in the training part.

    Args:
        raw: the column.
        train: the indices of the rows of the training part, an int64 array.
        max_categories: the number of categories that are kept.
    """
    values = raw.values[train]
    if raw.kind == "empty" or len(values) == 0:
        return None
    if raw.kind == "category":
        counts = Counter(values.tolist())
        if len(counts) < 2:
            return None
        counts.pop("", None)
        common = [name for name, count in counts.most_common(max_categories) if count >= _MIN_ROWS]
        return Feature(raw.name, raw.kind, categories=tuple(sorted(common)))
    gaps = np.isnan(values[:, 0])
    present = values[~gaps]
    varying = [k for k in range(values.shape[1]) if len(present) and present[:, k].min() < present[:, k].max()]
    if not varying and (raw.kind == "date" or gaps.all() or not gaps.any()):
        return None
    chosen = varying if raw.kind == "date" else [0]
    scaled = [_mean_and_deviation(present[:, k]) for k in chosen]
    centers, scales = (tuple(pair[which] for pair in scaled) for which in (0, 1))
    parts = tuple(DATE_PARTS[k] for k in chosen) if raw.kind == "date" else ()
    return Feature(raw.name, raw.kind, parts, centers, scales, bool(gaps.any()))


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and the standard deviation of float64 values, of 1 for values that do not vary.

    The squares of values near the largest of float64 would be infinite, so that the function computes with fractions.
    """
    largest = float(np.abs(values).max()) or 1.0
    fractions = values / largest
    deviation = float(fractions.std()) * largest
    return float(fractions.mean()) * largest, deviation if deviation > 0 and np.isfinite(deviation) else 1.0


def _listed(value: Any) -> list[Any]:
    return value if type(value) is list else []
