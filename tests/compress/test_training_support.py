"""What the callbacks of compression ask of a training: each refusal says what is true, and what to change."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import WeightAveraging
from pruned_trainings import loader, seeded
from support.trainers import bare_trainer
from torch.utils.data import DataLoader, IterableDataset

from lightkit.compress import Prune, Quantize, Sparsify
from lightkit.compress.training_support import round_steps
from lightkit.errors import ConfigError


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        return iter(loader().dataset)


@pytest.mark.parametrize(
    ("end", "rounds", "expected"),
    [
        (1.0, 2, r"X: end=1\.0 leaves none of the 32 steps of the training after .*; end must be below 0\.984"),
        (0.99, 2, r"must be below 0\.984"),
        (0.98, 40, "X: 40 rounds need more than the 32 steps of the training"),
        (1.0, 32, "X: 32 rounds need more than the 32 steps of the training"),
    ],
)
def test_no_step_after_the_last_round(end, rounds, expected):
    """An end that is too late is named, and so is a number of rounds that has no place."""
    assert round_steps("X", 0.5, 0.983, 2, 32) == [16, 31]
    with pytest.raises(ConfigError, match=expected):
        round_steps("X", 0.5, end, rounds, 32)


def test_unknown_length():
    """With data without a length, max_epochs does not help: it may be set already."""
    trainer = bare_trainer(Sparsify(0.5), max_epochs=2, num_sanity_val_steps=0)
    with pytest.raises(ConfigError, match=r"needs the length of the training: set max_steps$"):
        trainer.fit(seeded(), DataLoader(Stream(), batch_size=8))


@pytest.mark.parametrize(
    ("callback", "models"),
    [
        (Prune(0.5), "of several sizes"),
        (Sparsify(0.5), "with and without zeros"),
        (Quantize(8), "with and without rounding"),
    ],
    ids=["Prune", "Sparsify", "Quantize"],
)
def test_averaged_models(callback, models):
    """A callback that averages weights is refused for what it would mix: Prune alone makes models smaller."""
    trainer = bare_trainer(callback, WeightAveraging(), num_sanity_val_steps=0)
    with pytest.raises(ConfigError, match=f"WeightAveraging would average the weights of models {models}"):
        trainer.fit(seeded(), loader())
