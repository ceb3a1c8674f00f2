"""A model that ``lightkit.fit`` compresses is saved small, and comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lightkit
from lightkit.compress import Prune, Quantize


def samples():
    random = np.random.default_rng(0)
    labels = np.arange(640) % 10
    return (random.integers(0, 30, (640, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8), labels


@pytest.mark.parametrize("callbacks", [[Quantize(4)], [Prune(0.3, rounds=2)], [Prune(0.3, rounds=2), Quantize(2)]])
def test_saved_and_loaded(tmp_path, callbacks):
    """The widths, integers and ranges come back from the file: the predictions are the same to the bit."""
    x, y = samples()
    result = lightkit.fit("cnn", x, y, epochs=2, batch_size=64, verbose=False, callbacks=callbacks)
    result.save(tmp_path / "model.ckpt")
    again = lightkit.load(tmp_path / "model.ckpt")
    expected = result.predict(x[:50])
    assert np.array_equal(again.predict(x[:50]), expected)
    size = (tmp_path / "model.ckpt").stat().st_size
    assert size < 250_000 and torch.load(tmp_path / "model.ckpt", weights_only=True)
