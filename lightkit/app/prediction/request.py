"""The input and the options of a prediction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightkit.data.tables import TableSettings
from lightkit.errors import ConfigError

# Fields of a request that are arguments of `lightkit.data.columns.read_column`.
COLUMN_FIELDS = ("column", "time_column", "missing")

# Fields of a request that are settings of a table.
TABLE_FIELDS = tuple(field.name for field in fields(TableSettings))


@dataclass(frozen=True)
class PredictionRequest:
    """The input and the options of a prediction, which are keys of ``conf/predict.yaml``.

    An option that is None has the default of the task. The word before each description names the kind of input.

    Args:
        input: the file or folder of images, or several of them, see `lightkit.app.prediction.inputs.find_inputs`; the
            table of a series, or the file of a text.
        invert: images: invert the brightness; ``"auto"`` inverts an image of another size with a bright border.
        batch_size: images and tables: the number of images or rows in a batch.
        column: series: the column of the table.
        horizon: series: the number of steps to forecast.
        time_column: series: the column of times.
        missing: series: what becomes of gaps, as in `lightkit.data.Series`.
        separator: series and tables: the separator of the cells; this field and those below are as in
            `lightkit.data.tables.TableSettings`.
        decimal: series and tables: the decimal mark.
        encoding: series and tables: the encoding.
        header: series and tables: True if the first line has the names of the columns.
        skip_lines: series and tables: the number of lines above the table.
        sheet: series and tables: the sheet of a workbook.
        day_first: series and tables: True if the day comes before the month.
        text: text: the text to continue, instead of ``input``.
        length: text: the number of bytes to add.
        temperature: text: the sampling temperature; 0 takes the most probable byte.
        top_k: images: the number of the most probable classes in the output; text: the number of most probable bytes
            to sample from.
        seed: text: the seed of the sampling.
        weights: text: the precision of the weights, ``"float32"`` or ``"int8"``, see `lightkit.models.decoder`.
        cache: text: the precision of the keys and values of a transformer, likewise.
    """

    input: str | None = None
    invert: bool | Literal["auto"] | None = None
    batch_size: int | None = None
    column: str | None = None
    horizon: int | None = None
    time_column: str | None = None
    missing: str | None = None
    separator: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    header: bool | None = None
    skip_lines: int | None = None
    sheet: str | None = None
    day_first: bool | None = None
    text: str | None = None
    length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    seed: int | None = None
    weights: str | None = None
    cache: str | None = None

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Returns the fields among ``names`` that are not None, by name."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def batch_size_or(self, default: int) -> int:
        """Returns ``batch_size``, or ``default`` if it is None.

        Raises:
            ConfigError: it is below 1.
        """
        size = default if self.batch_size is None else self.batch_size
        if size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {size}")
        return size

    def require_input(self, kind: str) -> str:
        """Returns ``input`` after a check that it is given.

        Args:
            kind: the kind of input for the message, such as ``images``.

        Raises:
            ConfigError: ``input`` is None.
        """
        if self.input is None:
            raise ConfigError(f"input=PATH must say which {kind} the prediction is for")
        return self.input
