"""A data module of the rows of a table: numbers and categories, from which a model predicts one column."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.data.advice import advise
from lightkit.data.batches import TensorBatches, after_setup, shard_kwargs, to_training_device
from lightkit.data.folds import Fold, Foldable
from lightkit.data.tables import Table, TableSettings, read_table
from lightkit.data.tabular import baselines
from lightkit.data.tabular.encoding import TableEncoding
from lightkit.data.tabular.frames import frame_to_table, is_frame
from lightkit.data.tabular.preparation import PreparedTable, Wishes, prepare, prepare_rows
from lightkit.data.tabular.split import check_sizes
from lightkit.data.tabular.targets import KINDS
from lightkit.errors import DataError


class TableDataModule(Foldable, pl.LightningDataModule):
    """A data module of the rows of a table, which predicts the column ``target`` from other columns.

    A batch is ``(numbers, labels)``, or ``(numbers, categories, labels)`` if a column has categories: numbers float32
    ``(N, F)``, categories int64 ``(N, K)``, and labels int64 ``(N)`` or, for a regression, targets float64 ``(N)``.

    Numbers are standardised by the training part; a gap becomes the mean, and one more number marks gaps. Columns of
    text are categories, with an index for gaps and one for unknown texts, which those of a single training row have,
    too. A date becomes the numbers year, month, day, weekday and hour. Constant columns, columns that number or name
    the rows, and texts of which most differ are left out. Lines say what is left out and how the file was read.

    `with_fold` holds out a fold of the rows outside the test, with the same mix of classes, or with ``time_column`` a
    block of time; the rows of the other folds alone decide on means, deviations and categories.

    All of that is the attribute ``fitted``, a `TableEncoding`, which a checkpoint keeps (`state_dict`): evaluation and
    prediction encode another table in the same way.

    Args:
        path: a file that `lightkit.data.tables.read_table` reads.
        target: the name of the column to predict.
        kind: ``"classification"`` or ``"regression"``. None takes texts, truth values and few different whole numbers
            for classes: see `lightkit.data.tabular.targets.read_target`.
        columns: the names of the columns that the model reads, a list or a text such as ``"[a, b]"``; none of them is
            left out unless it is constant. None takes all that teach something.
        ignore: the names of columns that the model does not read.
        categories: the names of columns of numbers that are categories, such as codes.
        test_path: a file with the test rows; None takes ``test_size`` of the rows of ``path``.
        time_column: the name of a column of times, in whose order the rows are split: the last are the test. None
            splits at random, with the same mix of classes in each part.
        validation_size: the size of the validation part: a number of rows, or below 1 a share; 0 for none.
        test_size: the size of the test part likewise.
        separator: the separator of the cells; this argument and those below are as in
            `lightkit.data.tables.TableSettings`, and None finds each of them.
        decimal: the decimal mark.
        encoding: the name of the encoding of the characters.
        header: True if the first line has the names of the columns.
        skip_lines: the number of lines above the table.
        sheet: the name of the sheet of a workbook.
        day_first: True if the day comes before the month.
        batch_size: the number of rows in a batch of training.
        eval_batch_size: the number of rows in a batch of validation and test; it changes the speed only.
        seed: the seed of the order of the training batches.
        split_seed: the seed of the split.

    Raises:
        DataError: an argument is out of its range, or `setup` cannot use the file.
    """

    # The plural of a sample, which `lightkit.callbacks.Throughput` logs.
    unit = "rows"

    def __init__(
        self,
        path: str | None = None,
        target: str | int | None = None,
        kind: str | None = None,
        columns: str | Sequence[str | int] | None = None,
        ignore: str | Sequence[str | int] | None = None,
        categories: str | Sequence[str | int] | None = None,
        test_path: str | None = None,
        time_column: str | int | None = None,
        validation_size: float = 0.15,
        test_size: float = 0.15,
        separator: str | None = None,
        decimal: str | None = None,
        encoding: str | None = None,
        header: bool | None = None,
        skip_lines: int | None = None,
        sheet: str | int | None = None,
        day_first: bool | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if kind is not None and kind not in KINDS:
            raise DataError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise DataError(f"{name} must be at least 1, got {value}")
        check_sizes({"validation_size": validation_size, "test_size": test_size})
        self.path, self.test_path = path, test_path
        # On a command line a column or sheet 2020 is a number.
        self.target = None if target is None else str(target)
        self.wishes = Wishes(
            kind,
            _names("columns", columns),
            _names("ignore", ignore),
            _names("categories", categories),
            None if time_column is None else str(time_column),
            {"validation": validation_size, "test": test_size},
            split_seed,
        )
        sheet = None if sheet is None else str(sheet)
        self.settings = TableSettings(separator, decimal, encoding, header, skip_lines, sheet, day_first)
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.table: Table | None = None
        self.fitted: TableEncoding | None = None
        self._is_restored = False
        self._prepared: PreparedTable | None = None
        self._lines: list[str] = []

    @classmethod
    def from_frame(cls, frame: Any, target: str, **options: Any) -> TableDataModule:
        """Returns the data module of a ``pandas.DataFrame``, without its index.

        Args:
            frame: the frame.
            target: the name of the column to predict.
            **options: further arguments of the class.
        """
        module = cls(None, target, **options)
        module.table = frame_to_table(frame)
        return module

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, for which the table is read; None for a regression."""
        return self._found().classes

    @property
    def num_classes(self) -> int | None:
        """The number of classes, for which the table is read; None for a regression."""
        return None if self.classes is None else len(self.classes)

    def task_name(self) -> str:
        """Returns ``"classification"`` or ``"regression"``, for which the table is read."""
        return KINDS[self.classes is None]

    def model_sizes(self) -> dict[str, Any]:
        """Returns the sizes of a model for this table, by the name of its argument: see `lightkit.data.sizes_of`."""
        found = self._found()
        sizes = {"input_size": found.input_size, "category_sizes": found.category_sizes}
        if found.classes is None:
            return {**sizes, "num_outputs": 1}
        return {**sizes, "num_outputs": len(found.classes), "num_classes": len(found.classes)}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The arguments from which a checkpoint builds a data module that reads such tables, as plain containers."""
        return {"path": self.path, "target": self._found().target, **asdict(self.settings)}

    def setup(self, stage: str | None = None) -> None:
        """Reads the table and splits it; a second call does nothing. The first process prints how."""
        self._prepare()
        lines, self._lines = self._lines, []
        if self.trainer is None or self.trainer.is_global_zero:
            for line in lines:
                print(line, flush=True)

    def encode(self, x: Any, with_target: bool = False) -> tuple[Tensor, ...]:
        """Returns the rows of another table as the inputs of the model, and prints what is unknown in them.

        Args:
            x: a file, a table, or a DataFrame.
            with_target: append the labels or targets; rows without a target are left out then.

        Raises:
            DataError: the table cannot be read, has not the columns of the training, or no row.
        """
        table = self.read(x)
        found = self._found()
        if with_target:
            prepared = prepare_rows(table, found)
            numbers, categories, target, notes = *prepared.tensors, prepared.notes
            inputs = (numbers, categories, target) if found.category_sizes else (numbers, target)
        else:
            inputs, notes = self.encode_rows(table)
        for note in [*([", ".join(table.notes)] if table.notes else []), *notes]:
            print(_line(table, note), flush=True)
        return inputs

    def encode_rows(self, table: Table) -> tuple[tuple[Tensor, ...], list[str]]:
        """Returns the rows of a table as the inputs of the model, and notes on what is unknown in them.

        Raises:
            DataError: the table has not the columns of the training, or a cell has no number.
        """
        found = self._found()
        numbers, categories, notes = found.encode(table)
        return (numbers, categories) if found.category_sizes else (numbers,), notes

    def read(self, x: Any) -> Table:
        """Reads a table as this data module reads its own: ``x`` is a file, a table, or a DataFrame."""
        if isinstance(x, Table):
            return x
        return frame_to_table(x) if is_frame(x) else read_table(Path(os.fspath(x)), self.settings)

    def state_dict(self) -> dict[str, Any]:
        """Returns the encoding as plain containers, which a checkpoint keeps for later tables."""
        return {} if self.fitted is None else {"encoding": self.fitted.to_plain()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the encoding of a checkpoint, which may come from an untrusted source.

        Raises:
            DataError: the state is not that of `state_dict`, or is that of another table than has been read.
        """
        if not state_dict:
            return
        found = TableEncoding.from_plain(state_dict.get("encoding") if type(state_dict) is dict else None)
        if self._prepared is None:
            self.fitted, self._is_restored = found, True
        elif not _is_same(found, self._found()):
            raise DataError(f"{self.path} is not the table with which the training began: its columns or values differ")

    def target_scale(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the training targets, float64 ``(1)`` each."""
        targets = self._part("train")[-1]
        deviation, mean = torch.std_mean(targets, correction=0)
        return mean.reshape(1), deviation.reshape(1)

    def training_labels(self) -> Tensor:
        """Returns the labels or targets of the training rows, ``(N)``."""
        return self._part("train")[-1]

    def baselines(self) -> dict[str, float]:
        """Returns the test metrics of simple rules: see `lightkit.data.tabular.baselines`."""
        found = self._found()
        return baselines.evaluate(self._tensors("train"), self._tensors("test"), found.category_sizes, self.num_classes)

    def train_dataloader(self) -> TensorBatches:
        """Returns shuffled batches of the training rows."""
        return self._batches("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches | list[Tensor]:
        """Returns batches of the validation rows in order; an empty list if there are none."""
        return self._batches("validation", self.eval_batch_size) if len(self._part("validation")[0]) else []

    def test_dataloader(self) -> TensorBatches:
        """Returns batches of the test rows in order.

        Raises:
            DataError: there are none.
        """
        if len(self._part("test")[0]) == 0:
            raise DataError(f"{advise('test_size=0')} leaves no rows for the test; test=false trains without one")
        return self._batches("test", self.eval_batch_size)

    def predict_dataloader(self) -> TensorBatches:
        """Returns batches of the test rows in order."""
        return self.test_dataloader()

    def _begin_fold(self, fold: Fold) -> None:
        # The encoding of other rows would know those of the fold.
        self._prepared, self.fitted, self._is_restored, self._lines = None, None, False, []

    def _found(self) -> TableEncoding:
        if self.fitted is None:
            self._prepare()
        assert self.fitted is not None
        return self.fitted

    def _prepare(self) -> None:
        if self._prepared is not None:
            return
        # A restored encoding needs the training rows only where they have the test rows among them.
        if self._is_restored and self.test_path is not None and self.fitted is not None:
            test = self.read(self.test_path)
            prepared = PreparedTable(self.fitted, {"test": prepare_rows(test, self.fitted)}, [])
            tables = [test]
        else:
            table = self._read_own()
            test = None if self.test_path is None else self.read(self.test_path)
            prepared = prepare(table, test, self.target, self.wishes, self.fitted, self.fold)
            tables = [table, *([test] if test is not None else [])]
        self._lines += [_line(table, ", ".join(table.notes)) for table in tables if table.notes]
        self._lines += [_line(tables[0], note) for note in prepared.notes]
        self._lines += [_line(tables[-1], note) for part in prepared.parts.values() for note in part.notes]
        self._prepared, self.fitted = prepared, prepared.encoding

    def _read_own(self) -> Table:
        if self.table is None and self.path is None:
            raise DataError(f"{advise('path=FILE')} must name the file of the table")
        return self.read(self.path if self.table is None else self.table)

    def _tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return after_setup(self._prepared).parts[name].tensors

    def _part(self, name: str) -> tuple[Tensor, ...]:
        """Returns the tensors of a part as a batch has them."""
        prepared = after_setup(self._prepared)
        if name not in prepared.parts:
            return (torch.empty(0),)
        numbers, categories, target = prepared.parts[name].tensors
        return (numbers, categories, target) if prepared.encoding.category_sizes else (numbers, target)

    def _batches(self, name: str, batch_size: int, shuffle: bool = False) -> TensorBatches:
        return TensorBatches(
            to_training_device(self.trainer, self._part(name)),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **shard_kwargs(self.trainer, training=shuffle),
        )


def _names(argument: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        # On a command line a list whose names have parentheses is one text.
        value = next(csv.reader([value[1:-1]], skipinitialspace=True), [])
    if isinstance(value, (str, int)):
        return (str(value),)
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, (str, int)) for name in value):
        raise DataError(f"{argument} must be a list of names of columns, got {value!r}")
    return tuple(map(str, value))


def _line(table: Table, note: str) -> str:
    return printable(f"{table.path.name}: {note}")


def _is_same(one: TableEncoding, other: TableEncoding) -> bool:
    """Returns True if two encodings agree; their statistics may differ by the rounding of another machine."""
    plain = [encoding.to_plain() for encoding in (one, other)]
    statistics = []
    for node in plain:
        lists = [feature.pop(name) for feature in node["features"] for name in ("centers", "scales")]
        statistics.append([torch.tensor(values, dtype=torch.float64) for values in lists])
    return plain[0] == plain[1] and all(
        torch.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(*statistics, strict=True)
    )
