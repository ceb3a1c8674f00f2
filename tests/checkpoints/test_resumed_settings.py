"""A training that resumes with other settings has the learning rates of one that had them from the start."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from support.trainers import bare_trainer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

import lightkit.optim
from lightkit.checkpoints import AtomicCheckpointIO
from lightkit.checkpoints.resumed_settings import ResumedSettings
from lightkit.checkpoints.training_state import CheckTrainingState
from lightkit.errors import CheckpointError
from lightkit.optim import WarmupCosine

STEPS = 3


class Net(pl.LightningModule):
    """A module that keeps the learning rate and the momentum of every step."""

    def __init__(self, optimizer, scheduler=None, interval="epoch", frequency=1):
        super().__init__()
        self.frequency = frequency
        self.layer = torch.nn.Linear(2, 1)
        self.make_optimizer, self.make_scheduler, self.interval = optimizer, scheduler, interval
        self.rates = []

    def training_step(self, batch, batch_idx):
        (group,) = self.trainer.optimizers[0].param_groups
        self.rates.append((group["lr"], group.get("momentum")))
        loss = self.layer(batch).square().sum()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        entry = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval, "monitor": "loss"}
        entry["frequency"] = self.frequency
        return {"optimizer": optimizer, "lr_scheduler": entry}


def fit(net, epochs, *callbacks, path=None, **options):
    data = DataLoader(torch.ones(2 * STEPS, 2), batch_size=2)
    trainer = bare_trainer(*callbacks, max_epochs=epochs, plugins=[AtomicCheckpointIO()], **options)
    trainer.fit(net, data, ckpt_path=path)
    return trainer


class SaveAtEnd(pl.Callback):
    """Saves where `lightkit.callbacks.Checkpoint` does, at the end of an epoch of training."""

    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def resumed_rates(path, before, after, epochs, changed=(), **options):
    """Returns the rates of a training that had the settings ``before`` for two epochs, and then ``after``."""
    fit(Net(*before), 2, SaveAtEnd(path, 1))
    net = Net(*after)
    fit(net, epochs, ResumedSettings(path, changed, **options), CheckTrainingState(path), path=path)
    return net.rates


def rates_in_one_go(settings, epochs):
    net = Net(*settings)
    fit(net, epochs)
    return net.rates[2 * STEPS :]


def sgd(lr=0.1):
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


def sequence(milestone):
    def make(optimizer):
        parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=milestone), schedulers.ExponentialLR(optimizer, 0.9)]
        return schedulers.SequentialLR(optimizer, parts, [milestone])

    return make


def chain(gamma):
    def make(optimizer):
        parts = [schedulers.ConstantLR(optimizer, 0.5, 3), schedulers.ExponentialLR(optimizer, gamma)]
        return schedulers.ChainedScheduler(parts, optimizer)

    return make


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (partial(schedulers.CosineAnnealingLR, T_max=2), partial(schedulers.CosineAnnealingLR, T_max=12)),
        (
            partial(schedulers.OneCycleLR, max_lr=1.0, total_steps=7),
            partial(schedulers.OneCycleLR, max_lr=1.0, total_steps=40),
        ),
        (partial(schedulers.StepLR, step_size=1), partial(schedulers.StepLR, step_size=3, gamma=0.5)),
        (partial(schedulers.MultiStepLR, milestones=[1]), partial(schedulers.MultiStepLR, milestones=[3, 4])),
        (partial(schedulers.LinearLR, total_iters=2), partial(schedulers.LinearLR, total_iters=9)),
        (partial(schedulers.PolynomialLR, total_iters=2), partial(schedulers.PolynomialLR, total_iters=9, power=2)),
        (
            partial(schedulers.CosineAnnealingWarmRestarts, T_0=2),
            partial(schedulers.CosineAnnealingWarmRestarts, T_0=5),
        ),
        (
            partial(schedulers.CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=2),
            partial(schedulers.CyclicLR, base_lr=0.1, max_lr=2.0, step_size_up=5),
        ),
        (sequence(1), sequence(4)),
        (partial(WarmupCosine, total_steps=4, warmup=0.5), partial(WarmupCosine, total_steps=30, warmup=4)),
        (chain(0.9), chain(0.5)),
        # Another class, and the first one.
        (partial(schedulers.CosineAnnealingLR, T_max=2), partial(schedulers.StepLR, step_size=3)),
        (None, partial(schedulers.StepLR, step_size=3)),
        (partial(schedulers.StepLR, step_size=1), None),
    ],
)
def test_schedule(tmp_path, before, after, interval):
    """Whatever has changed in a schedule, the rates and the cycled momentum are those of one go."""
    found = resumed_rates(tmp_path / "a.ckpt", (sgd(), before, interval), (sgd(), after, interval), 5)
    assert found == [pytest.approx(rates) for rates in rates_in_one_go((sgd(), after, interval), 5)]


def test_learning_rate(tmp_path):
    """A learning rate of the present run is that of the first step on: alone, and as the base of a schedule."""
    cosine = partial(schedulers.CosineAnnealingLR, T_max=5)
    for scheduler in (None, cosine):
        found = resumed_rates(tmp_path / "a.ckpt", (sgd(0.1), scheduler), (sgd(0.7), scheduler), 5, ["lr"])
        assert found == [pytest.approx(rates) for rates in rates_in_one_go((sgd(0.7), scheduler), 5)]


def test_interval(tmp_path):
    """A schedule in steps continues from the steps that were done when it was in epochs."""
    before = (sgd(), partial(schedulers.CosineAnnealingLR, T_max=4), "epoch")
    after = (sgd(), partial(schedulers.CosineAnnealingLR, T_max=4 * STEPS), "step")
    found = resumed_rates(tmp_path / "a.ckpt", before, after, 4)
    assert found == [pytest.approx(rates) for rates in rates_in_one_go(after, 4)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frequency(tmp_path, accumulate):
    """A scheduler that is called every second batch of an epoch continues where one go would be."""
    path = tmp_path / "a.ckpt"
    options = {"accumulate_grad_batches": accumulate}
    before = Net(sgd(), partial(schedulers.StepLR, step_size=1), "step")
    fit(before, 2, SaveAtEnd(path, 1), **options)
    after = (sgd(), partial(schedulers.ExponentialLR, gamma=0.5), "step", 2)
    net, whole = Net(*after), Net(*after)
    fit(net, 4, ResumedSettings(path), CheckTrainingState(path), path=path, **options)
    fit(whole, 4, **options)
    assert net.rates == [pytest.approx(rates) for rates in whole.rates[2 * STEPS :]]


def test_unchanged_settings_keep_the_state(tmp_path):
    """Without a change the saved state counts, with a rate that a callback has set."""

    class Halve(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups[0]["lr"] = 0.05

    path = tmp_path / "a.ckpt"
    fit(Net(sgd()), 2, Halve(), SaveAtEnd(path, 1))
    net = Net(sgd())
    fit(net, 3, ResumedSettings(path), CheckTrainingState(path), path=path)
    assert net.rates == [(0.05, 0.9)] * STEPS


def test_within_an_epoch(tmp_path):
    """A checkpoint within an epoch has finished the steps and epochs before it."""
    path = tmp_path / "a.ckpt"

    class SaveWithin(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == STEPS + 1:
                trainer.save_checkpoint(path)

    for interval in ("epoch", "step"):
        longer = (sgd(), partial(schedulers.CosineAnnealingLR, T_max=9), interval)
        fit(Net(sgd(), partial(schedulers.CosineAnnealingLR, T_max=5), interval), 2, SaveWithin())
        net, whole = Net(*longer), Net(*longer)
        fit(net, 3, ResumedSettings(path), CheckTrainingState(path), path=path)
        fit(whole, 3)
        assert net.rates == [pytest.approx(rates) for rates in whole.rates[STEPS + 1 :]]


def test_plateau(tmp_path):
    """A schedule by metrics keeps what it has seen; its settings are the present ones."""
    before = partial(schedulers.ReduceLROnPlateau, patience=7, factor=0.5)
    path = tmp_path / "a.ckpt"
    trainer = fit(Net(sgd(), before), 2, SaveAtEnd(path, 1))
    seen = trainer.lr_scheduler_configs[0].scheduler.best
    net = Net(sgd(), partial(schedulers.ReduceLROnPlateau, patience=3, factor=0.1))
    trainer = fit(net, 2, ResumedSettings(path), CheckTrainingState(path), path=path)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.patience, scheduler.factor) == (3, 0.1)
    assert scheduler.best in (seen, torch.load(path, weights_only=True)["lr_schedulers"][0]["best"])
    with pytest.raises(CheckpointError, match="needs the metrics of the epochs before"):
        resumed_rates(path, (sgd(),), (sgd(), before), 3)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (partial(lightkit.optim.Adam, lr=0.1), {"weight_decay": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}),
        (partial(torch.optim.Adam, lr=0.1), {"weight_decay": 0.5, "amsgrad": True}),
        (partial(lightkit.optim.Adam, lr=0.1), {"amsgrad": True}),
        (partial(lightkit.optim.SGD, lr=0.1), {"momentum": 0.5, "nesterov": True}),
        (partial(torch.optim.SGD, lr=0.1), {"momentum": 0.5}),
        (partial(lightkit.optim.SGD, lr=0.1), {"ema_decay": 0.5}),
    ],
)
def test_hyperparameters(tmp_path, make, changes):
    """Changed hyperparameters are the present ones, in the steps and the next checkpoint; the others stay."""
    path = tmp_path / "a.ckpt"
    fit(Net(make), 2, SaveAtEnd(path, 1))
    net = Net(partial(make, **changes))
    trainer = fit(net, 3, ResumedSettings(path, changes), CheckTrainingState(path), path=path)
    state = trainer.optimizers[0].state_dict()
    assert {name: state["param_groups"][0][name] for name in changes} == changes
    entry = next(iter(state["state"].values()))
    assert ("max_exp_avg_sq" in entry) == ("amsgrad" in changes) and ("average" in entry) == ("ema_decay" in changes)
    # Without the callback the saved values count.
    trainer = fit(Net(partial(make, **changes)), 2, path=path)
    assert {name: trainer.optimizers[0].param_groups[0][name] for name in changes} != changes


@pytest.mark.parametrize(("name", "entry"), [("ema_decay", "average"), ("amsgrad", "max_exp_avg_sq")])
def test_options_that_end(tmp_path, name, entry):
    """An option that ends leaves nothing behind, with which it would begin again later."""
    path = tmp_path / "a.ckpt"
    make = partial(lightkit.optim.Adam, lr=0.1)
    fit(Net(partial(make, **{name: 0.9})), 2, SaveAtEnd(path, 1))
    assert entry in torch.load(path, weights_only=True)["optimizer_states"][0]["state"][0]
    trainer = fit(Net(make), 3, ResumedSettings(path, [name]), CheckTrainingState(path), path=path)
    assert all(entry not in found for found in trainer.optimizers[0].state.values())


def test_another_class_has_all_of_its_hyperparameters(tmp_path):
    """AdamW that goes on from Adam decays its weights as AdamW."""
    path = tmp_path / "a.ckpt"
    fit(Net(partial(lightkit.optim.Adam, lr=0.1)), 2, SaveAtEnd(path, 1))
    net = Net(partial(lightkit.optim.AdamW, lr=0.1))
    trainer = fit(net, 3, ResumedSettings(path, None), CheckTrainingState(path), path=path)
    (group,) = trainer.optimizers[0].param_groups
    assert group["decoupled_weight_decay"] and group["weight_decay"] == 0.01


def test_patience(tmp_path):
    """The patience of early stopping is the present one; what it has counted is the saved one."""
    path = tmp_path / "a.ckpt"
    options = {"monitor": "loss", "check_on_train_epoch_end": True}
    fit(Net(sgd(0.0)), 2, EarlyStopping(patience=7, **options), SaveAtEnd(path, 1))
    present = EarlyStopping(patience=4, **options)
    fit(Net(sgd(0.0)), 9, present, ResumedSettings(path), CheckTrainingState(path), path=path)
    assert (present.patience, present.wait_count) == (4, 4) and present.stopped_epoch < 7


def test_too_many_steps(tmp_path):
    """A checkpoint that claims any number of steps does not keep the program busy."""
    path = tmp_path / "a.ckpt"
    fit(Net(sgd(), partial(schedulers.StepLR, step_size=1)), 2, SaveAtEnd(path, 1))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["epoch"] = 10**12
    torch.save(checkpoint, path)
    net = Net(sgd(), partial(schedulers.StepLR, step_size=2))
    with pytest.raises(CheckpointError, match="the limit is 10,000,000"):
        fit(net, -1, ResumedSettings(path), CheckTrainingState(path), path=path, max_steps=9)
