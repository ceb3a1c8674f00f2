"""Folds of cross-validation: together they are the data outside the test, and no two of them overlap."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.series import write_wave

from lightkit.data import DataModule, Fold, MNIST5k, Series, Text
from lightkit.errors import DataError


@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.integers(2, 9), st.integers(0, 5))
def test_stratified_folds_are_a_partition(labels, count, seed):
    """Each sample is in one fold, and neither a class nor the whole differs by more than one between two folds."""
    classes = torch.tensor(labels)
    if len(labels) < count:
        with pytest.raises(DataError, match=f"{count} folds need at least {count} samples"):
            Fold(0, count).split(classes, seed)
        return
    parts = [Fold(index, count).split(classes, seed) for index in range(count)]
    assert sorted(torch.cat([held_out for _, held_out in parts]).tolist()) == list(range(len(labels)))
    assert all(sorted([*rest.tolist(), *held_out.tolist()]) == list(range(len(labels))) for rest, held_out in parts)
    counts = torch.stack([classes[held_out].bincount(minlength=5) for _, held_out in parts])
    assert (counts.amax(dim=0) - counts.amin(dim=0) <= 1).all()
    assert counts.sum(dim=1).max() - counts.sum(dim=1).min() <= 1


@given(st.integers(2, 500), st.integers(2, 9))
def test_blocks_are_a_partition(total, count):
    """Blocks follow each other from the first value to the last."""
    if total >= count:
        blocks = [Fold(index, count).block(total) for index in range(count)]
        assert blocks[0][0] == 0 and blocks[-1][1] == total
        assert all(one[1] == other[0] for one, other in pairwise(blocks))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40), st.integers(2, 6))
def test_dealt_files_are_a_partition(sizes, count):
    """Each file is in one fold, no fold is empty, and no two differ by more than the largest file."""
    if len(sizes) < count:
        return
    dealt = [Fold(index, count).deal(sizes) for index in range(count)]
    assert all(sum(column) == 1 for column in zip(*dealt, strict=True))
    filled = [sum(size for size, mine in zip(sizes, held, strict=True) if mine) for held in dealt]
    assert min(filled) > 0 and max(filled) - min(filled) <= max(sizes)


@pytest.mark.parametrize(
    ("index", "count", "message"), [(0, 1, "at least 2, got 1"), (5, 5, "0 to 4, got 5"), (-1, 5, "0 to 4")]
)
def test_wrong_folds(index, count, message):
    """One line names the number that is out of range, before anything is read."""
    with pytest.raises(DataError, match=message):
        MNIST5k().with_fold(index, count)


def test_images_keep_their_test_set():
    """Each fold of images is a fifth of the training set with all classes; the test set is that of no fold."""
    data = MNIST5k(validation_size=400)
    data.setup()
    held_out = []
    for index in range(5):
        fold = data.with_fold(index, 5)
        fold.setup()
        assert torch.equal(fold.test.images, data.test.images)
        assert (len(fold.train), len(fold.validation)) == (3200, 800)
        assert fold.validation.labels.bincount().tolist() == [80] * 10
        held_out.append(fold.validation.images.flatten(1))
    whole = torch.cat([data.train.images, data.validation.images]).flatten(1)
    assert torch.equal(torch.cat(held_out).sum(dim=1).sort().values, whole.sum(dim=1).sort().values)
    # The original stays as it is.
    assert data.fold is None and len(data.validation) == 400


def test_arrays():
    """Folds of arrays share one order, also a fold that is made from another one, and take all but the test samples."""
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    data = DataModule.from_arrays(x, y, validation=0.3, test=(x[:3] + 100, y[:3]))
    folds = [data.with_fold(0, 4)]
    for index in range(1, 4):
        folds.append(folds[-1].with_fold(index, 4))
    held_out = torch.cat([fold.parts["validation"][0][:, 0] for fold in folds])
    assert sorted(held_out.tolist()) == x[:, 0].tolist()
    for fold in folds:
        assert fold.parts["validation"][1].tolist().count(1) in (2, 3) and len(fold.parts["test"][0]) == 3
        assert not set(fold.parts["train"][0][:, 0].tolist()) & set(fold.parts["validation"][0][:, 0].tolist())
    assert len(data.parts["validation"][0]) == 6


def test_targets_have_folds_too():
    """Samples with targets of floating point have folds of equal size."""
    data = DataModule.from_arrays(np.random.default_rng(0).normal(size=(21, 3)), np.linspace(0, 1, 21), validation=0)
    assert [len(data.with_fold(index, 4).parts["validation"][0]) for index in range(4)] == [6, 5, 5, 5]


def test_series_has_blocks_without_leaks(tmp_path):
    """No training window of a fold contains a value that the fold validates, neither as target nor as history."""
    write_wave(tmp_path / "wave.csv")
    data = Series(str(tmp_path / "wave.csv"), column="price", history=12, horizon=4, test_size=0.2)
    data.setup()
    targets = []
    for index in range(3):
        fold = data.with_fold(index, 3)
        fold.setup()
        assert torch.equal(fold.test.target, data.test.target)
        begin, end = Fold(index, 3).block(len(data.series) - round(0.2 * len(data.series)))
        origins = fold.train.origins
        assert ((origins + 4 <= begin) | (origins - 12 >= end)).all() and origins.max() + 4 <= 0.8 * len(
            data.series
        ) + 1
        values = data.series.values
        assert torch.equal(fold.train.history[-1, :, 0], values[origins[-1] - 12 : origins[-1]])
        assert fold.validation.origins.min() >= begin and fold.validation.origins.max() + 4 <= end
        targets.append(fold.validation.origins)
        # The scale is that of the values that the fold trains on.
        others = torch.cat([values[:begin], values[end : len(values) - round(0.2 * len(values))]])
        assert fold.scale()[0] == pytest.approx(others.mean().item())
    assert len(torch.cat(targets).unique()) == sum(map(len, targets))


def test_series_without_a_window(tmp_path):
    """A block that is shorter than the horizon is an error that names the fold."""
    write_wave(tmp_path / "wave.csv")
    data = Series(str(tmp_path / "wave.csv"), column="price", history=12, horizon=4).with_fold(1, 100)
    with pytest.raises(DataError, match=r"validation part of fold 1 of 100 has \d+, too few"):
        data.setup()


def test_text_by_block(tmp_path):
    """The folds of a file are its blocks, and the last part of the file stays the test."""
    content = bytes(32 + n % 90 for n in range(9000))
    (tmp_path / "text.txt").write_bytes(content)
    data = Text(str(tmp_path / "text.txt"), context=10, test_share=0.1)
    data.setup()
    for index in range(3):
        fold = data.with_fold(index, 3)
        parts = [bytes(part.tolist()) for part in fold._parts()]
        begin, end = 2700 * index, 2700 * (index + 1)
        assert parts[1] == content[begin:end] and parts[2] == content[8100:]
        assert parts[0].replace(b"\0", b"") == content[:begin] + content[end:8100]
        fold.setup()
        assert torch.equal(fold.test, data.test) and len(fold.train) > len(fold.validation) > 0


def test_text_by_file(tmp_path, monkeypatch):
    """The files of a folder are dealt whole; with too few files one line says so."""
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_bytes(bytes([65 + number]) * (100 + 10 * number))
    data = Text(str(folder), context=10, validation_share=0, test_share=0.2)
    data.setup()
    seen = []
    for index in range(3):
        fold = data.with_fold(index, 3)
        fold.setup()
        train, validation, test = (
            set(part.flatten().tolist()) - {0} for part in (fold.train, fold.validation, fold.test)
        )
        assert test == set(data.test.flatten().tolist()) - {0} and not (train & validation or train & test)
        seen.append(validation)
    assert sum(map(len, seen)) == len(set.union(*seen)) == 12 - len(test)
    with pytest.raises(DataError, match="20 folds need at least 20 files outside the test set"):
        data.with_fold(0, 20).setup()


def test_the_example_of_the_documentation():
    """The program in docs/folds.md trains a model for each fold, and averages them."""
    page = (Path(__file__).parents[2] / "docs" / "folds.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert len(names["results"]) == 5 and len(set(names["losses"])) == 5
    assert names["probabilities"].shape == (200, 2)
    assert torch.allclose(names["probabilities"].sum(dim=1), torch.ones(200))
