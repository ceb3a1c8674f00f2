"""The search for the smallest model: which candidates are made, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightkit.app import compression_search
from lightkit.compress import QuantizationScheme

NAME = "val/accuracy"


def made(accuracy):
    return SimpleNamespace(validation={NAME: accuracy}, path=Path("a.ckpt"), callbacks=[])


@given(
    drops=st.lists(st.floats(0, 0.5), min_size=1, max_size=12).map(sorted),
    fitting=st.integers(0, 12),
    max_drop=st.floats(0, 0.3),
)
def test_the_last_that_keeps_the_accuracy(drops, fitting, max_drop):
    """Of models that lose more the smaller they are, and of which those from ``fitting`` on cannot be made."""
    trials = []
    found = compression_search._bisect(
        range(len(drops)),
        lambda i: made(1 - drops[i]) if i < fitting else None,
        1.0,
        max_drop,
        trials,
        lambda i: {"index": i},
    )
    keeping = [i for i, drop in enumerate(drops[:fitting]) if drop <= max_drop + compression_search._TOLERANCE]
    assert (None if found is None else found[0]) == (keeping[-1] if keeping else None)
    indices = [trial["index"] for trial in trials]
    assert len(set(indices)) == len(indices) <= len(drops).bit_length() + 1
    assert all(("drop" in trial) == (trial["index"] < fitting) for trial in trials)


def test_each_training_has_a_directory(monkeypatch, tmp_path):
    """Candidates of the same mean of bits do not write into one."""
    order = [{"a": 8, "b": 4}, {"a": 4, "b": 8}, {"a": 6, "b": 6}, {"a": 5, "b": 7}]
    weights = [(name, None, torch.zeros(3)) for name in "ab"]
    monkeypatch.setattr(compression_search, "measure_losses", lambda *_: {})
    monkeypatch.setattr(compression_search, "order_of_bits", lambda *_: order)
    monkeypatch.setattr(compression_search, "quantizable_weights", lambda _: weights)
    monkeypatch.setattr(compression_search, "replace", lambda value, **changes: value)
    monkeypatch.setattr(QuantizationScheme, "formats", lambda *_: dict.fromkeys("ab"))
    directories = []

    def train(directory, scheme, distil):
        directories.append(directory)
        return made(1.0)

    job = SimpleNamespace(
        calibrate=lambda *_: (None, SimpleNamespace(spec=lambda _: None)),
        validation_loss=lambda _: None,
        round=lambda _: made(0.0),
        train=train,
        directory=tmp_path,
        request=SimpleNamespace(distil=0.0),
        epochs=1,
    )
    found = compression_search._search_bits(job, 1.0, 0.01, [])
    assert found is not None
    assert len(directories) == len(set(directories)) > 1


def test_no_validation_accuracy():
    with pytest.raises(compression_search.ConfigError, match="max_drop needs a task with the metric accuracy"):
        compression_search.dense_accuracy(
            SimpleNamespace(validate=lambda _: {"val/loss": 1.0}, restored=SimpleNamespace(task=None))
        )
