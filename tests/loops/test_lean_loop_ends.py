"""A run of the lean loop that stops, fails or resumes leaves what one of Lightning's loop leaves."""

from __future__ import annotations

import csv
import itertools
import os
import signal

import lightning.pytorch as pl
import pytest
import torch.nn.functional as F
from lean_runs import Module, assert_equal, assert_same, bare_trainer, loader, run
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torch.utils.data import DataLoader


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
