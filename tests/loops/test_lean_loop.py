"""Compares a run of the lean loop with one of Lightning's loop to the bit, to the counter and to the call."""

from __future__ import annotations

import copy
import csv
import functools
import gc
import itertools
import os
import pickle
import signal
import weakref
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightkit.callbacks import LeanLoop
from lightkit.loops.step import LeanStep

HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_train_epoch_end",
)


class MemoryLogger(Logger):
    """Keeps the metrics that it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name = property(lambda self: "memory")
    version = property(lambda self: 0)

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))


class Watcher(Callback):
    """Overrides every hook of a step and records each call, its arguments and the visible state."""

    def __init__(self):
        self.calls = []

    def _note(self, hook, trainer, *facts):
        counters = trainer.fit_loop.epoch_loop.state_dict()
        del counters["val_loop.state_dict"], counters["val_loop.batch_progress"]
        self.calls.append((hook, trainer.global_step, str(counters), *map(str, facts)))


def _watching(hook):
    def method(self, trainer, pl_module, *args):
        facts = [pl_module._current_fx_name]
        if hook == "on_train_batch_end":
            facts += [args[0], args[2], sorted(trainer.callback_metrics.items())]
        self._note(hook, trainer, *facts)

    return method


for _hook in HOOKS:
    setattr(Watcher, _hook, _watching(_hook))


class Module(pl.LightningModule):
    """A usual module: dropout, a metric, several ways to log."""

    def __init__(self, interval="step", output="tensor"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.interval = interval
        self.output = output

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self.net(inputs)
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("largest", logits.max(), reduce_fx="max", on_epoch=True, on_step=False)
        self.log("index", batch_idx, on_step=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        if self.interval == "own step":
            self.log("step", float(100 + batch_idx))
        self.log_dict({"a": loss * 2, "b": loss.detach().double()}, batch_size=5 if batch_idx % 2 else 3)
        if self.output == "none" and batch_idx % 3 == 1:
            return None
        return {"loss": loss, "extra": batch_idx} if self.output == "dict" else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("logged in a hook", float(batch_idx))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.interval == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            entry = {"scheduler": scheduler, "interval": "step", "monitor": "loss", "frequency": 2}
        else:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
            interval = "step" if self.interval == "own step" else self.interval
            entry = {"scheduler": scheduler, "interval": interval, "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": entry}


def loader(count=44, batch_size=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, shuffle=True)


def bare_trainer(lean, *callbacks, **options):
    """Returns a trainer of one epoch that writes and shows nothing."""
    nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [*callbacks, *([LeanLoop()] if lean else [])]
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **nothing, "callbacks": callbacks, **options})


def run(lean, directory, make=Module, callbacks=(), ckpt_path=None, checkpoints=None, train=None, **options):
    """Trains once; returns everything that the tests compare."""
    pl.seed_everything(3, verbose=False)
    module = make()
    logger, watcher, loop = MemoryLogger(), Watcher(), LeanLoop()
    extra = [c() for c in callbacks]
    saving = ModelCheckpoint(dirpath=directory, **(checkpoints or {"save_last": True}))
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": directory,
            "num_sanity_val_steps": 0,
            "logger": logger,
            "callbacks": [watcher, saving, *extra, *([loop] if lean else [])],
            **options,
        }
    )
    steps = 0
    original = LeanStep.__call__

    def counting(self, fetcher):
        nonlocal steps
        steps += 1
        return original(self, fetcher)

    LeanStep.__call__ = counting
    try:
        trainer.fit(module, loader() if train is None else train, loader(12, seed=2), ckpt_path=ckpt_path)
    finally:
        LeanStep.__call__ = original
    assert type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop
    assert "log" not in vars(module)
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "loops": str(trainer.fit_loop.state_dict()),
        "rows": logger.rows,
        "calls": watcher.calls,
        "metrics": {k: v.clone() for k, v in trainer.callback_metrics.items()},
        "logged": {k: v.clone() for k, v in trainer.logged_metrics.items()},
        "files": sorted(os.listdir(directory)),
        "best": saving.best_model_score,
        "steps": trainer.global_step,
    }, (steps, loop.unsupported_reason)


def assert_same(tmp_path, **options):
    own, _ = run(False, tmp_path / "own", **options)
    ours, (steps, obstacle) = run(True, tmp_path / "lean", **options)
    assert obstacle is None
    assert steps > 0
    assert_equal(ours, own)
    return ours


def assert_equal(ours, own, where=""):
    """Asserts equality to the bit; names the first difference."""
    assert type(ours) is type(own), where
    if isinstance(own, dict):
        assert sorted(ours, key=str) == sorted(own, key=str), where
        for key in own:
            assert_equal(ours[key], own[key], f"{where}.{key}")
    elif isinstance(own, (list, tuple)):
        for index, pair in enumerate(itertools.zip_longest(ours, own)):
            assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(own, torch.Tensor):
        torch.testing.assert_close(ours, own, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == own or (ours != ours and own != own), where


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


class StopAt(Callback):
    """Makes the trainer stop at a step, from a hook of the batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            trainer.should_stop = True


@pytest.mark.parametrize("min_epochs", [None, 2])
def test_a_callback_may_stop_a_run_at_any_step(tmp_path, min_epochs):
    """`should_stop` ends the epoch at that step with a validation, or continues up to min_epochs."""
    ours = assert_same(tmp_path, callbacks=[StopAt], min_epochs=min_epochs, max_epochs=3)
    assert ours["steps"] == (6 if min_epochs is None else 22)


class Boom(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 5:
            raise RuntimeError("boom")


def test_the_row_of_the_step_that_stops(tmp_path):
    """The last step is logged even between two logging steps."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 6

    ours = assert_same(tmp_path, callbacks=[Stop], log_every_n_steps=50)
    assert len(ours["rows"]) > 0


def test_a_batch_size_by_position(tmp_path):
    """A positional batch size may differ in each step."""

    class Positional(Module):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, False, True, False, True, "mean", False, False, None, True, 1 + 10 * batch_idx)
            return loss

    assert_same(tmp_path, make=Positional)


def test_an_exception_leaves_lightnings_loop_behind(tmp_path):
    """Loop and module are restored after an error, and the counters show the step."""
    trainers = []
    for lean in (False, True):
        pl.seed_everything(3, verbose=False)
        module = Module()
        trainer = bare_trainer(lean, Boom())
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(module, loader())
        assert type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop and "log" not in vars(module)
        trainers.append(trainer)
    own, ours = (str(t.fit_loop.epoch_loop.state_dict()) for t in trainers)
    assert ours == own


def test_an_exception_loses_no_logged_row(tmp_path):
    """Loggers write their files once a second, and also when a run fails."""
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = bare_trainer(True, Boom(), logger=logger, log_every_n_steps=1)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(Module(), loader())
    with open(tmp_path / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4"]


class Terminate(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_run_at_the_next_step(tmp_path):
    """A cluster's signal takes effect after the step in which it arrives, as without the lean loop."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    for lean in (False, True):
        trainer = bare_trainer(lean, Terminate())
        with pytest.raises((SIGTERMException, SystemExit)):
            trainer.fit(Module(), loader())
        assert trainer.global_step == 5


class Stateful:
    """A loader that resumes within an epoch."""

    def __init__(self):
        self.batches = list(DataLoader(loader().dataset, batch_size=4))
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start = self.position if self.position < len(self.batches) else 0
        for index in range(start, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_checkpoint_of_one_loop_goes_on_in_the_other(tmp_path):
    """Runs that either loop saved within an epoch and either loop resumed end the same."""
    saving = {"every_n_train_steps": 5, "save_top_k": -1, "filename": "{step}"}

    class Deterministic(Module):
        def __init__(self):
            super().__init__()
            self.net[2] = nn.Identity()

    options = {"make": Deterministic, "checkpoints": saving}
    whole, _ = run(False, tmp_path / "whole", train=Stateful(), **options)
    for first, second in itertools.product((False, True), repeat=2):
        path = tmp_path / f"{first}{second}"
        run(first, path / "a", train=Stateful(), max_steps=5, **options)
        checkpoint = path / "a" / "step=5.ckpt"
        resumed, (steps, _) = run(second, path / "b", train=Stateful(), ckpt_path=checkpoint, **options)
        assert (steps > 0) == second
        assert_equal(resumed["weights"], whole["weights"])
        assert_equal(resumed["optimizer"], whole["optimizer"])
        assert resumed["steps"] == whole["steps"]


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
def test_what_is_not_lightnings_step_stays_as_it_is(tmp_path, leaves_no_process_group, cause, options):
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
