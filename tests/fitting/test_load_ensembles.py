"""`lightkit.load` of several files: one model that predicts the mean, and errors for models that do not go together."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import lightkit
from lightkit.errors import CheckpointError, ConfigError

ROWS = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
LABELS = np.arange(60) % 3


def save(path, y=LABELS, x=ROWS, **options):
    """Fits a linear model, writes it to ``path``, and returns the result."""
    outputs = len(np.unique(y)) if y.dtype.kind == "i" else 1
    result = lightkit.fit(nn.Sequential(nn.Linear(x.shape[1], outputs)), x, y, epochs=1, verbose=False, **options)
    result.save(path)
    return result


def test_classes_have_the_mean_of_the_probabilities(tmp_path):
    """The ensemble predicts and evaluates the mean; it is no file itself."""
    members = [save(tmp_path / f"{seed}.ckpt", LABELS, seed=seed, validation=0.1 + 0.1 * seed) for seed in range(3)]
    together = lightkit.load([tmp_path / "0.ckpt", str(tmp_path / "1.ckpt"), tmp_path / "2.ckpt"])
    mean = np.mean([member.predict(ROWS) for member in members], axis=0)
    assert np.allclose(together.predict(ROWS), mean, atol=1e-6) and together.classes == ("0", "1", "2")
    assert together.evaluate(ROWS, LABELS)["accuracy"] == pytest.approx((mean.argmax(axis=1) == LABELS).mean())
    assert together.history == {}
    with pytest.raises(ConfigError, match="an ensemble has no file of its own"):
        together.save(tmp_path / "together.ckpt")


def test_values_have_the_mean_in_their_units(tmp_path):
    """The members standardise their targets differently."""
    targets = 100 + 5 * ROWS[:, 0]
    members = [save(tmp_path / "a.ckpt", targets), save(tmp_path / "b.ckpt", 10 * targets)]
    together = lightkit.load((tmp_path / "a.ckpt", tmp_path / "b.ckpt"))
    assert np.allclose(together.predict(ROWS), (members[0].predict(ROWS) + members[1].predict(ROWS)) / 2)
    error = np.abs(together.predict(ROWS)[:, 0] - targets).mean()
    assert together.evaluate(ROWS, targets)["mae"] == pytest.approx(error)


def test_directories_of_fits(tmp_path):
    """A directory names the model that `fit` left there; a list of one file is that file."""
    result = save(tmp_path / "a.ckpt", run_dir=tmp_path / "run")
    assert np.array_equal(lightkit.load(tmp_path / "run").predict(ROWS), result.predict(ROWS))
    assert len(lightkit.load([tmp_path / "run", tmp_path / "a.ckpt"]).model.models) == 2
    assert lightkit.load([tmp_path / "a.ckpt"]).history == result.history


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "path must name at least one file, got an empty list"),
        (["a", "nowhere"], "there is no checkpoint .*nowhere"),
        (
            ["a", "two"],
            r"a and .*two make no ensemble: data.classes is \['0', '1', '2'\] in the first and \['0', '1'\]",
        ),
        (["a", "values"], "the task is ClassificationTask in the first and RegressionTask in the second"),
        (["a", "wide"], "make no ensemble: data.format is .* in the first and"),
    ],
)
def test_members_that_do_not_go_together(tmp_path, names, message):
    """Each difference is one line that names the files."""
    save(tmp_path / "a")
    save(tmp_path / "two", LABELS % 2)
    save(tmp_path / "values", ROWS[:, 0])
    save(tmp_path / "wide", x=np.concatenate([ROWS, ROWS], axis=1))
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        lightkit.load([tmp_path / name for name in names])
    assert len(str(error.value).splitlines()) == 1


def test_an_instance_goes_with_one_file(tmp_path):
    """A list with an instance would say nothing of the other members."""
    save(tmp_path / "a")
    with pytest.raises(ConfigError, match="model goes with one file, and path names 2"):
        lightkit.load([tmp_path / "a", tmp_path / "a"], nn.Linear(4, 3))
