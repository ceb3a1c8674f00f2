"""Runs of the same training by the lean loop and by Lightning's loop, and the comparison of what they leave."""

from __future__ import annotations

import itertools
import os

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
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
