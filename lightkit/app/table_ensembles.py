"""Ensembles of models of tables, each of which has the encoding of its own training rows, as the folds have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightkit.app.restore import RestoredTask
from lightkit.data import TableDataModule
from lightkit.data.tabular import TableEncoding


def encoding_of(member: RestoredTask) -> TableEncoding | None:
    """Returns the encoding of a restored task for tables; None for other data."""
    node = member.config.get("data")
    if not isinstance(node, dict) or node.get("_target_") != "lightkit.data.TableDataModule":
        return None
    data = member.build_data()
    assert isinstance(data, TableDataModule)
    return data.fitted


def share_inputs(members: Sequence[RestoredTask]) -> list[RestoredTask]:
    """Returns restored tasks that take the same batches, whose rows are encoded for each of them, side by side.

    Members of other data, and of one encoding, are returned as they are. A model that is changed keeps its weights.

    Args:
        members: the tasks.
    """
    encodings = [encoding for member in members if (encoding := encoding_of(member)) is not None]
    if len(encodings) < len(members) or all(encoding == encodings[0] for encoding in encodings):
        return list(members)
    joint = replace(encodings[0], features=tuple(feature for encoding in encodings for feature in encoding.features))
    numbers = categories = 0
    for member, encoding in zip(members, encodings, strict=True):
        widths = encoding.input_size, len(encoding.category_sizes)
        ranges = slice(numbers, numbers + widths[0]), slice(categories, categories + widths[1])
        numbers, categories = numbers + widths[0], categories + widths[1]
        member.task.model = _ColumnsOf(member.task.model, *ranges)  # pyright: ignore
    return [replace(member, encoding=joint) for member in members]


class _ColumnsOf(nn.Module):
    """Gives a model its columns of the rows that are encoded for several models.

    Args:
        model: the model, which takes numbers, and categories if there are any.
        numbers: the range of its columns of numbers.
        categories: the range of its columns of categories.
    """

    def __init__(self, model: nn.Module, numbers: slice, categories: slice) -> None:
        super().__init__()
        self.model = model
        self._numbers, self._categories = numbers, categories

    def forward(self, numbers: Tensor, *categories: Tensor) -> Tensor:
        """Returns the outputs of the model for numbers ``(N, F)`` and categories ``(N, K)`` of all models."""
        has_categories = self._categories.stop > self._categories.start
        own = [part[:, self._categories] for part in categories] if has_categories else []
        return self.model(numbers[:, self._numbers], *own)
