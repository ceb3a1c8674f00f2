"""Compares a run of the lean loop with one of Lightning's loop to the bit, to the counter and to the call."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lean_runs import Module, assert_equal, assert_same, bare_trainer, loader, run
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightkit.callbacks import LeanLoop


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"make": lambda: Module("epoch")}, id="scheduler by the epoch"),
        pytest.param({"make": lambda: Module("plateau")}, id="plateau scheduler by the step"),
        pytest.param({"make": lambda: Module("own step")}, id="a step of one's own in the log"),
        pytest.param({"make": lambda: Module(output="dict")}, id="training_step returns a dict"),
        pytest.param({"make": lambda: Module(output="none")}, id="training_step returns None at times"),
        pytest.param({"accumulate_grad_batches": 3}, id="accumulation, not dividing the epoch"),
        pytest.param({"accumulate_grad_batches": 4, "max_steps": 4, "max_epochs": -1}, id="accumulation to max_steps"),
        pytest.param({"gradient_clip_val": 0.05}, id="clipping by norm"),
        pytest.param({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, id="clipping by value"),
        pytest.param({"val_check_interval": 4}, id="validation every 4 batches"),
        pytest.param({"val_check_interval": 0.5}, id="validation twice an epoch"),
        pytest.param({"val_check_interval": 7, "check_val_every_n_epoch": None}, id="validation across epochs"),
        pytest.param({"check_val_every_n_epoch": 2}, id="validation every second epoch"),
        pytest.param({"limit_val_batches": 0}, id="no validation"),
        pytest.param({"limit_train_batches": 5}, id="a part of the batches"),
        pytest.param({"max_steps": 15, "max_epochs": -1}, id="max_steps in the middle of an epoch"),
        pytest.param({"precision": "bf16-mixed"}, id="bfloat16"),
        pytest.param({"precision": "64-true"}, id="float64"),
        pytest.param({"log_every_n_steps": 1}, id="logging every step"),
        pytest.param({"logger": False}, id="no logger"),
        pytest.param({"num_sanity_val_steps": 2}, id="sanity check"),
        pytest.param({"reload_dataloaders_every_n_epochs": 1}, id="new loaders each epoch"),
        pytest.param({"overfit_batches": 6}, id="overfitting"),
        pytest.param(
            {"checkpoints": {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}},
            id="checkpoints every 4 steps",
        ),
        pytest.param(
            {"checkpoints": {"every_n_train_steps": 4, "save_top_k": 2, "monitor": "loss"}}, id="monitored checkpoints"
        ),
        pytest.param({"callbacks": [LearningRateMonitor]}, id="learning-rate monitor"),
        pytest.param({"callbacks": [lambda: Timer(duration="00:01:00:00")]}, id="timer"),
        pytest.param(
            {"callbacks": [lambda: EarlyStopping("val_loss", patience=1, mode="max")], "max_epochs": 5},
            id="early stopping",
        ),
    ],
)
def test_a_run_is_the_same_to_the_bit(tmp_path, options):
    """Weights, optimizer, counters, log, checkpoints and every call of a hook are those of Lightning's loop."""
    assert_same(tmp_path, **options)


class Normalized(Module):
    """Has a batch norm, whose statistics stochastic weight averaging computes in an epoch without backward."""

    def __init__(self):
        super().__init__("epoch")
        self.net.insert(1, nn.BatchNorm1d(8))


@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_weight_averaging_with_batch_norm(tmp_path, limit_val_batches):
    """The epoch that only updates batch norms changes no weight."""
    averaging = [lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]
    assert_same(tmp_path, make=Normalized, callbacks=averaging, max_epochs=3, limit_val_batches=limit_val_batches)


class Wrapping(Callback):
    """Puts an instrumented hook on the module and a mock on a callback, as tests and tracers do."""

    def setup(self, trainer, pl_module, stage):
        original = pl_module.on_before_zero_grad
        self.calls = calls = []

        @functools.wraps(original)
        def instrumented(*args):
            calls.append(trainer.global_step)
            return original(*args)

        vars(pl_module)["on_before_zero_grad"] = instrumented
        self.on_after_backward = Mock()

    def on_fit_end(self, trainer, pl_module):
        del vars(pl_module)["on_before_zero_grad"]
        pl_module.seen = (self.calls, self.on_after_backward.call_count)


def test_wrapped_hooks_are_called():
    """A wrapper of an empty hook, or a mock, is called in every step."""
    seen = []
    for lean in (False, True):
        module = Module()
        bare_trainer(lean, Wrapping()).fit(module, loader())
        seen.append(module.seen)
    assert seen[0] == seen[1] == (list(range(11)), 11)


class Copying(Callback):
    """Copies the module within an epoch, as a hand-written weight average does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 5:
            self.copy = copy.deepcopy(pl_module)
            self.pickled = pickle.dumps(pl_module)


def test_a_copy_of_the_module_is_free_of_the_run(tmp_path):
    """A module that is copied or pickled during a step logs like any other and has no trainer."""
    copying = Copying()
    run(True, tmp_path, callbacks=[lambda: copying])
    for module in (copying.copy, pickle.loads(copying.pickled)):
        assert module._trainer is None
        assert getattr(module.log, "__func__", None) is pl.LightningModule.log
    assert len(copying.pickled) < 20_000


def test_data_of_another_kind_or_shared(tmp_path):
    """A list as data set, and one data set for training and validation, train as without the lean loop."""
    samples = list(loader().dataset)
    assert_same(tmp_path / "list", train=DataLoader(samples, batch_size=4))
    shared = loader()
    whole = []
    for lean in (False, True):
        pl.seed_everything(3, verbose=False)
        module = Module()
        trainer = bare_trainer(lean, max_epochs=2)
        trainer.fit(module, shared, DataLoader(shared.dataset, batch_size=5))
        whole.append((module.state_dict(), trainer.callback_metrics))
    assert_equal(*whole)


class OwnStep(Module):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(list(loader().dataset))


class OwnStrategy(DDPStrategy):
    """A subclass of a known strategy, whose step may differ."""


@pytest.mark.parametrize(
    ("cause", "options"),
    [
        ("OwnStep.optimizer_step takes over", {"make": OwnStep}),
        ("optimizes manually", {"make": Manual}),
        ("SimpleProfiler measures", {"profiler": SimpleProfiler()}),
        ("the strategy is OwnStrategy", {"strategy": OwnStrategy()}),
        ("known only at its end", {"train": DataLoader(Unsized(), batch_size=4)}),
        ("validation comes by the clock", {"val_check_interval": {"seconds": 30}, "check_val_every_n_epoch": None}),
    ],
)
def test_what_is_not_lightnings_step_stays_as_it_is(tmp_path, cause, options):
    """If a part of the step is replaced, no lean step runs, and the callback has a reason."""
    _, (steps, obstacle) = run(True, tmp_path, **options)
    assert cause in obstacle
    assert steps == 0


def test_another_release_of_lightning_is_left_alone(tmp_path, monkeypatch):
    """Lightning runs the loop of a release that lean steps were not compared with."""
    monkeypatch.setattr(pl, "__version__", "2.7.0")
    _, (steps, obstacle) = run(True, tmp_path)
    assert steps == 0 and "2.7.0" in obstacle


def test_log_refuses_what_lightnings_refuses(tmp_path):
    """A value of several elements, or changed options, fail at any step as at the first."""

    class Wrong(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 5:
                self.log("loss", torch.zeros(2), prog_bar=True, on_step=True, on_epoch=True)
            return loss

    with pytest.raises(ValueError, match="single element"):
        run(True, tmp_path, make=Wrong)

    class Changing(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("c", loss, on_step=batch_idx != 5, on_epoch=True)
            return loss

    with pytest.raises(Exception, match="with different arguments"):
        run(True, tmp_path, make=Changing)


def test_progress_bar_shows_the_end_of_an_epoch(tmp_path, capsys):
    """The last batch redraws a bar that is redrawn by time."""
    run(True, tmp_path, enable_progress_bar=True, callbacks=[])
    assert "11/11" in capsys.readouterr().out


def test_loaders_are_let_go_of():
    """A data set of one epoch is freed before the end of the fit."""
    alive = []

    class Reloading(Module):
        def train_dataloader(self):
            data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
            alive.append(weakref.ref(data))
            return DataLoader(data, batch_size=4)

        def on_train_epoch_start(self):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 2

    options = {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": False, "logger": False}
    pl.Trainer(
        accelerator="cpu", callbacks=[LeanLoop()], enable_progress_bar=False, enable_model_summary=False, **options
    ).fit(Reloading())
    assert len(alive) == 5
