"""Folds of tables: each row outside the test is held out once, and teaches nothing where it is held out."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import public_frame, write_customers, write_rows

import lightkit
import lightkit.data
from lightkit.data import Foldable, TableDataModule
from lightkit.errors import DataError

pandas = pytest.importorskip("pandas")


def frame_of(rows=60, seed=0):
    """Returns a frame with numbers, a category, a date, gaps, and a row number that tells the rows apart."""
    random = np.random.default_rng(seed)
    frame = pandas.DataFrame({"row": np.arange(rows) / 2, "size": random.normal(size=rows).round(3)})
    frame["plan"] = random.choice(["basic", "plus", "pro"], rows)
    frame["since"] = [f"20{10 + row % 13}-0{1 + row % 9}-15" for row in range(rows)]
    frame["target"] = random.choice(["yes", "no"], rows, p=[0.3, 0.7])
    frame.loc[::7, "size"] = np.nan
    return frame


def folds_of(data, count):
    found = [data.with_fold(index, count) for index in range(count)]
    for fold in found:
        fold.setup()
    return found


def rows_of(fold, part):
    """Returns the row numbers of a part, which are the first number of each row."""
    numbers, feature = fold._part(part)[0][:, 0].double(), fold.fitted.features[0]
    return (2 * (numbers * feature.scales[0] + feature.centers[0])).round().int().tolist()


@pytest.mark.parametrize("time_column", [None, "row"])
def test_the_folds_are_a_partition(time_column):
    """Each row outside the test is in one fold, with the same mix of classes or in a block of time."""
    frame = frame_of()
    if time_column is not None:
        # Rows in the order of time are in another order in the table.
        frame = frame.sample(frac=1, random_state=1)
        frame["row"] = frame["row"] * 2 + 1900
    data = TableDataModule.from_frame(frame, "target", columns=["row", "plan"], time_column=time_column, test_size=12)
    data.setup()
    held_out = []
    for fold in folds_of(data, 4):
        train, validation, test = (rows_of(fold, part) for part in ("train", "validation", "test"))
        assert len(validation) == 12 and sorted(train + validation + test) == sorted(
            rows_of(data, "train") + rows_of(data, "validation") + rows_of(data, "test")
        )
        assert test == rows_of(data, "test") and not set(train) & set(validation)
        labels = fold._part("validation")[-1]
        if time_column is None:
            counts = data._part("train")[-1].bincount() + data._part("validation")[-1].bincount()
            assert (labels.bincount(minlength=2) - counts / 4).abs().max() < 1
        else:
            assert max(validation) - min(validation) == 2 * 11
        held_out += validation
    assert sorted(held_out) == sorted(set(held_out)) and len(held_out) == 48
    # The original keeps its own split.
    assert data.fold is None and len(data._part("validation")[-1]) == 9


@settings(max_examples=20)
@given(st.integers(0, 3), st.integers(0, 1000), st.booleans())
def test_no_statistic_of_the_held_out_rows_leaks(index, seed, is_regression):
    """Other values in the held-out rows change neither the encoding nor a training sample."""
    frame = frame_of(seed=seed)
    if is_regression:
        frame["target"] = np.random.default_rng(seed).normal(size=len(frame)).round(4)
    names = ["row", "size", "plan", "since"]
    data = TableDataModule.from_frame(frame, "target", columns=names, test_size=0.2)
    fold = data.with_fold(index, 4)
    fold.setup()
    held_out = [row for part in ("validation", "test") for row in rows_of(fold, part)]
    other = frame.copy()
    other.loc[held_out, "size"] = np.where(np.arange(len(held_out)) % 2, 1e6, np.nan)
    other.loc[held_out, "plan"] = np.where(np.arange(len(held_out)) % 2, "gold", "basic")
    other.loc[held_out, "since"] = "1950-12-31"
    changed = TableDataModule.from_frame(other, "target", columns=names, test_size=0.2).with_fold(index, 4)
    changed.setup()
    assert changed.fitted == fold.fitted
    assert all(torch.equal(*pair) for pair in zip(changed._part("train"), fold._part("train"), strict=True))
    # The encoding is that of the training rows: their numbers have the mean 0.
    assert fold._part("train")[0][:, 0].mean().abs() < 1e-5
    if is_regression:
        assert fold.target_scale()[0].item() == pytest.approx(fold._part("train")[-1].mean().item())


def test_a_whole_table_that_is_fitted_leaves_no_trace():
    """A fold of a data module whose encoding is known finds its own."""
    data = TableDataModule.from_frame(frame_of(), "target")
    data.setup()
    fresh, (first, second) = TableDataModule.from_frame(frame_of(), "target"), folds_of(data, 2)
    assert first.fitted != data.fitted != second.fitted != first.fitted
    assert folds_of(fresh, 2)[1].fitted == second.fitted == second.with_fold(0, 2).with_fold(1, 2)._found()


def test_rare_classes_are_held_out_once(tmp_path):
    """A class of two rows is never in the test, and its rows are in two folds."""
    rows = [f"{row % 7},{'rare' if row < 2 else 'ab'[row % 2]}" for row in range(42)]
    data = TableDataModule(str(write_rows(tmp_path / "t.csv", "a,y", rows)), "y", test_size=10)
    counts = [fold._part("validation")[-1].bincount(minlength=3)[2].item() for fold in folds_of(data, 2)]
    assert data.with_fold(0, 2).classes == ("a", "b", "rare") and counts == [1, 1]


def test_a_test_file_lies_in_no_fold(tmp_path):
    """The rows of `test_path` are the test of each fold, in the encoding of the fold."""
    write_customers(tmp_path / "a.csv"), write_customers(tmp_path / "b.csv", rows=30, seed=1)
    data = TableDataModule(str(tmp_path / "a.csv"), "leaves", test_path=str(tmp_path / "b.csv"))
    one, other = folds_of(data, 2)
    assert [len(fold._part("test")[-1]) for fold in (one, other)] == [30, 30]
    assert not torch.equal(one._part("test")[0], other._part("test")[0])
    assert len(one._part("validation")[-1]) + len(other._part("validation")[-1]) == 200


def test_more_folds_than_rows(tmp_path):
    """One line says how many rows there are."""
    path = write_rows(tmp_path / "t.csv", "a,y", [f"{row},{row % 2}" for row in range(20)])
    data = TableDataModule(str(path), "y", columns=["a"], test_size=4).with_fold(0, 17)
    with pytest.raises(DataError, match="17 folds need at least 17 samples outside the test set, got 16"):
        data.setup()


def test_models_of_folds_are_an_ensemble(tmp_path):
    """Each member of `lightkit.load` gets the rows in its own encoding, whose columns may be others."""
    frame = public_frame("iris")
    frame["colour"] = np.where(np.arange(150) % 50 == 0, "red", "blue")
    data = TableDataModule.from_frame(frame, "target", test_size=0)
    results = [lightkit.fit("mlp", data.with_fold(index, 3), epochs=3, verbose=False) for index in range(3)]
    for index, result in enumerate(results):
        result.save(tmp_path / f"{index}.ckpt")
    widths = {tuple(result.data.fitted.category_sizes) for result in results}
    together = lightkit.load([tmp_path / f"{index}.ckpt" for index in range(3)])
    mean = np.mean([result.predict(frame) for result in results], axis=0)
    assert np.allclose(together.predict(frame), mean, atol=1e-6) and together.classes == results[0].classes
    truth = np.array([together.classes.index(name) for name in frame["target"]])
    assert together.evaluate(frame)["accuracy"] == pytest.approx((mean.argmax(axis=1) == truth).mean())
    # The case is the general one: a category is too rare in one of the trainings.
    assert len(widths) > 1


def test_every_data_module_has_folds():
    """A data module without folds would make `kfold` an error for its data."""
    public = [getattr(lightkit.data, name) for name in lightkit.data.__all__]
    modules = [cls for cls in public if isinstance(cls, type) and issubclass(cls, pl.LightningDataModule)]
    assert len(modules) >= 10 and all(issubclass(cls, Foldable) for cls in modules)
