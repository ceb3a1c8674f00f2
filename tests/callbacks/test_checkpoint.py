"""last.ckpt is the latest checkpoint and best.ckpt the best, however many checkpoints are kept."""

from __future__ import annotations

import contextlib

import lightning.pytorch as pl
import pytest
import torch
from support.trainers import bare_trainer
from torch.utils.data import DataLoader

from lightkit.callbacks import Checkpoint
from lightkit.checkpoints import load_checkpoint
from lightkit.data import TensorBatches
from lightkit.errors import ConfigError


class GetsWorse(pl.LightningModule):
    """Its validation is the best in the first epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("options", "last"), [({}, 3), ({"every_n_epochs": 2}, 2), ({"save_last": False}, None)])
def test_last_is_the_latest(tmp_path, options, last):
    """best.ckpt stays that of the first validation; last.ckpt follows at every configured interval."""
    settings = {"filename": "best", "monitor": "val/loss", "mode": "min", "save_last": True, **options}
    batches = DataLoader(torch.ones(2, 1), batch_size=2)
    callback = Checkpoint(tmp_path, **settings)
    trainer = bare_trainer(callback, max_epochs=3, enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(GetsWorse(), batches, batches)
    assert load_checkpoint(tmp_path / "best.ckpt")["global_step"] == options.get("every_n_epochs", 1)
    path = tmp_path / "last.ckpt"
    assert (load_checkpoint(path)["global_step"] if path.exists() else None) == last


@pytest.mark.parametrize(
    "elsewhere", ["{0}/precious.ckpt", "{0}/run/../precious.ckpt", "memory://precious", "http://x"]
)
def test_a_strangers_state_names_no_file_of_the_users(tmp_path, elsewhere):
    """An untrusted state cannot make Lightning remove, read or fetch a file elsewhere."""
    (tmp_path / "stranger").mkdir()
    precious = tmp_path / "precious.ckpt"
    precious.write_text("mine")
    path = elsewhere.format(tmp_path)
    batches = DataLoader(torch.ones(2, 1), batch_size=2)
    settings = {"filename": "best", "monitor": "val/loss", "mode": "max", "save_last": True, "save_top_k": 1}
    trainer = bare_trainer(Checkpoint(tmp_path / "stranger", **settings), enable_checkpointing=True)
    trainer.fit(GetsWorse(), batches, batches)
    crafted = load_checkpoint(tmp_path / "stranger" / "last.ckpt")
    (state,) = (state for key, state in crafted["callbacks"].items() if key.startswith("Checkpoint"))
    del state["dirpath"]
    names = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), path)
    state.update(names, best_k_models={path: torch.tensor(-1.0)}, best_model_score=torch.tensor(-1.0))
    torch.save(crafted, tmp_path / "stranger" / "crafted.ckpt")
    callback = Checkpoint(tmp_path / "run", **settings)
    removed = []
    trainer = bare_trainer(callback, max_epochs=3, enable_checkpointing=True)
    trainer.strategy.remove_checkpoint = removed.append
    trainer.fit(GetsWorse(), batches, batches, ckpt_path=tmp_path / "stranger" / "crafted.ckpt")
    assert precious.read_text() == "mine"
    assert all(str(name).startswith(str(tmp_path / "run")) for name in removed)
    assert callback.best_model_path == str(tmp_path / "run" / "best.ckpt")


class Scores(GetsWorse):
    """Its validations have the given values."""

    def __init__(self, *values):
        super().__init__()
        self._values = iter(values)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", next(self._values))


SETTINGS = {"filename": "best", "monitor": "val/loss", "save_last": True, "enable_version_counter": False}


def fit(directory, module, epochs, ckpt_path=None, batches=1, **options):
    """Trains, and returns the callback after the training."""
    callback = Checkpoint(directory, **{**SETTINGS, **options})
    data = DataLoader(torch.ones(batches, 1), batch_size=1)
    trainer = bare_trainer(callback, max_epochs=epochs, enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(module, data, DataLoader(torch.ones(1, 1)), ckpt_path=ckpt_path)
    return callback


def step(path):
    return load_checkpoint(path)["global_step"]


def steps(directory):
    """Returns the step of each checkpoint by its name."""
    return {path.name: step(path) for path in directory.glob("*.ckpt")}


@pytest.mark.parametrize("counter", [False, True])
@pytest.mark.parametrize(
    ("options", "values", "best", "kept"),
    [
        ({"save_top_k": 3}, [3, 1, 2, 5, 4], 2, {1, 2, 3}),
        ({"save_top_k": 2, "mode": "max"}, [3, 7, 2, 5, 4], 2, {2, 4}),
        ({"save_top_k": -1}, [3, 1, 2], 2, {1, 2, 3}),
        ({"save_top_k": 2}, [float("nan"), 1, float("nan")], 2, {1, 2}),
        ({"save_top_k": 2, "every_n_epochs": 2}, [0, 3, 0, 1, 0, 2], 4, {4, 6}),
        ({"save_top_k": 2, "every_n_train_steps": 1}, [3, 1, 2], 2, {2, 3}),
        ({"save_top_k": -1, "monitor": None}, [3, 1, 2], 3, {1, 2, 3}),
        ({"save_top_k": 2, "auto_insert_metric_name": False}, [3, 1, 2], 2, {2, 3}),
    ],
)
def test_best_is_the_best_of_several(tmp_path, options, values, best, kept, counter):
    """With several checkpoints each has its own file, and best.ckpt, which people evaluate, is the best of them."""
    callback = fit(tmp_path, Scores(*values), len(values), enable_version_counter=counter, **options)
    found = steps(tmp_path)
    assert step(callback.best_model_path) == found.pop("best.ckpt") == best
    assert found.pop("last.ckpt") == len(values)
    assert found == {f"best-epoch={number - 1}-step={number}.ckpt": number for number in kept}


def test_no_best_is_kept(tmp_path):
    """save_top_k=0 keeps last.ckpt alone."""
    assert fit(tmp_path, Scores(1, 2), 2, save_top_k=0).best_model_path == ""
    assert steps(tmp_path) == {"last.ckpt": 2}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (3, 3, {2: 1.0, 3: 2.0, 5: 1.5}),
        (1, 3, {2: 1.0, 4: 5.0, 5: 1.5}),
        (3, 1, {2: 1.0}),
        (3, -1, {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 1.5}),
    ],
)
def test_resuming_keeps_the_best(tmp_path, elsewhere, before, after, kept):
    """The best of an earlier training stays the best, in its directory and in another one, with another save_top_k."""
    fit(tmp_path / "a", Scores(3, 1, 2), 3, save_top_k=before)
    place = tmp_path / ("b" if elsewhere else "a")
    callback = fit(place, Scores(5, 1.5), 5, tmp_path / "a" / "last.ckpt", save_top_k=after)
    assert {step(path): score.item() for path, score in callback.best_k_models.items()} == kept
    assert step(callback.best_model_path) == steps(place)["best.ckpt"] == 2
    assert all(path.startswith(str(place)) for path in callback.best_k_models)
    assert steps(place)["last.ckpt"] == 5


def test_resuming_from_before_a_removal(tmp_path):
    """A checkpoint that the training removed later is none of the best of a training that resumes from earlier."""
    fit(tmp_path, Scores(3, 2, 1), 3, save_top_k=2)
    old = tmp_path / "best-epoch=1-step=2.ckpt"
    callback = fit(tmp_path, Scores(4), 3, old, save_top_k=2)
    assert sorted(step(path) for path in callback.best_k_models) == [2, 3]
    assert step(callback.best_model_path) == steps(tmp_path)["best.ckpt"] == 2


def test_resuming_with_a_metric_in_the_name(tmp_path):
    """A metric's slash makes a directory below the checkpoints, in which the best is found again."""
    names = {"filename": "{epoch}-{val/loss:.1f}", "save_top_k": 2}
    fit(tmp_path / "a", Scores(3, 1), 2, **names)
    callback = fit(tmp_path / "b", Scores(2), 3, tmp_path / "a" / "last.ckpt", **names)
    assert sorted(step(path) for path in callback.best_k_models) == [2, 3]
    assert all(path.startswith(str(tmp_path / "b")) for path in callback.best_k_models)


@pytest.mark.parametrize("options", [{"save_top_k": 3}, {"save_top_k": -1, "monitor": None}])
def test_equal_names_of_several(tmp_path, options):
    """Two validations in an epoch give one name twice: no checkpoint replaces another that is kept."""
    callback = Checkpoint(tmp_path, **{**SETTINGS, "filename": "{epoch}", **options})
    data = DataLoader(torch.ones(2, 1))
    limits = {"max_epochs": 1, "val_check_interval": 0.5, "num_sanity_val_steps": 0, "limit_val_batches": 1}
    bare_trainer(callback, enable_checkpointing=True, **limits).fit(Scores(1, 2), data, data)
    assert steps(tmp_path) == {"epoch=0.ckpt": 1, "epoch=0-v1.ckpt": 2, "last.ckpt": 2}


def test_an_earlier_best_stays_with_the_version_counter(tmp_path):
    """The version counter promises that a second training overwrites nothing of a first."""
    for value in (3, 4):
        callback = fit(tmp_path, Scores(value), 1, save_top_k=2, enable_version_counter=True)
    best = {name: load_checkpoint(tmp_path / name)["callbacks"][callback.state_key] for name in steps(tmp_path)}
    assert best["best.ckpt"]["best_model_score"] == 3 and best["best-v1.ckpt"]["best_model_score"] == 4


def test_an_exception_is_not_the_best(tmp_path):
    """The checkpoint of save_on_exception leaves best.ckpt alone."""

    class Fails(Scores):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise RuntimeError

        def on_train_batch_end(self, *_):
            if self.current_epoch == 1 and self.trainer.is_last_batch:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(tmp_path, Fails(1, 2), 3, save_on_exception=True, batches=2)
    found = steps(tmp_path)
    assert found["best.ckpt"] == 2 and found["best-exception.ckpt"] == 4


def test_a_monitor_that_is_not_logged(tmp_path):
    """A misspelt monitor is one error with the nearest name, and last.ckpt has the training so far."""
    with pytest.raises(ConfigError, match=r"monitor=val/los of the checkpoints: .* val/loss; did you mean val/loss"):
        fit(tmp_path, Scores(1, 2), 2, monitor="val/los")
    assert steps(tmp_path) == {"last.ckpt": 1}


class Logs(GetsWorse):
    """Its validations log 3, 1 and 2 under a name of its own, or nothing."""

    def __init__(self, name):
        super().__init__()
        self.logged = name

    def validation_step(self, batch, batch_idx):
        if self.logged is not None:
            self.log(self.logged, float([3, 1, 2][self.current_epoch]))


@pytest.mark.parametrize("name", ["val_loss", "valid_loss", "loss/val", "validation/loss"])
def test_a_monitor_of_another_form(tmp_path, name):
    """The habitual names of the validation loss decide about the best checkpoint, and a resumed run goes on with it."""
    with pytest.warns(UserWarning, match=f"monitor=val/loss of the checkpoints is not logged: {name} is taken for it"):
        fit(tmp_path, Logs(name), 2)
    with pytest.warns(UserWarning, match="is taken for it"):
        callback = fit(tmp_path, Logs(name), 3, ckpt_path=tmp_path / "last.ckpt")
    assert steps(tmp_path) == {"best.ckpt": 2, "last.ckpt": 3}
    assert callback.best_model_score == 1 and "'val/loss'" in callback.state_key


@pytest.mark.parametrize("name", [None, "accuracy"])
def test_no_validation_loss(tmp_path, name):
    """A module without a validation loss keeps the latest checkpoint, and the training does not end for it."""
    with pytest.warns(UserWarning, match=f"the latest one; .*takes one of {name or 'no metric'}"):
        fit(tmp_path, Logs(name), 3)
    assert steps(tmp_path) == {"best.ckpt": 3, "last.ckpt": 3}


class Drops(GetsWorse):
    """A module with dropout, which logs nothing."""

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.dropout(self.layer(batch[0])).sum()


def fit_drops(directory, max_steps=-1, ckpt_path=None):
    # A process that resumes a job seeds the generators anew.
    torch.manual_seed(1)
    callback = Checkpoint(directory, save_last=True, every_n_train_steps=1)
    trainer = bare_trainer(callback, enable_checkpointing=True, max_epochs=2, max_steps=max_steps)
    module = Drops()
    trainer.fit(module, TensorBatches((torch.randn(16, 1),), 4), ckpt_path=ckpt_path)
    return module.layer.weight.detach()


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_dropout_after_a_resumption(tmp_path, stop):
    """A training that resumes within or after an epoch drops what a training without a stop drops."""
    whole = fit_drops(tmp_path / "whole")
    fit_drops(tmp_path / "stopped", max_steps=stop)
    assert torch.equal(fit_drops(tmp_path / "resumed", ckpt_path=tmp_path / "stopped" / "last.ckpt"), whole)


@pytest.mark.parametrize("states", [None, {"cpu": torch.zeros(3)}, {"cpu": torch.zeros(5056, dtype=torch.uint8)}])
def test_random_states_that_torch_rejects(tmp_path, states):
    """A checkpoint of another torch, or of a stranger, resumes with a warning, and the generator stays valid."""
    fit_drops(tmp_path / "a", max_steps=2)
    path = tmp_path / "a" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    torch.save({**checkpoint, "random_states": states}, path)
    with contextlib.nullcontext() if states is None else pytest.warns(UserWarning, match="random state"):
        assert fit_drops(tmp_path / "b", ckpt_path=path).isfinite().all()
    assert torch.rand(1).isfinite()
