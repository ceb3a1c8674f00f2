"""Untrusted states fit the training that resumes from them, or one line rejects them."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from support.trainers import bare_trainer
from torch.utils.data import DataLoader

from lightkit.checkpoints import AtomicCheckpointIO, load_checkpoint
from lightkit.checkpoints.training_state import CheckTrainingState, check_training_state
from lightkit.errors import CheckpointError


class Net(pl.LightningModule):
    """A module with two weights, a given optimizer and a scheduler."""

    def __init__(self, optimizer):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().sum()

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(optimizer, epochs, path=None, checks=()):
    trainer = bare_trainer(*checks, max_epochs=epochs, plugins=[AtomicCheckpointIO()])
    trainer.fit(Net(optimizer), DataLoader(torch.ones(4, 2), batch_size=2), ckpt_path=path)
    return trainer


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a checkpoint of each optimizer after an epoch."""
    folder = tmp_path_factory.mktemp("saved")
    for name, optimizer in OPTIMIZERS.items():
        fit(optimizer, 1).save_checkpoint(folder / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_of_ones_own_goes_on(saved, name):
    """A usual state is accepted, whatever the shapes of the optimizer's states."""
    path = saved / f"{name}.ckpt"
    check_training_state(load_checkpoint(path, untrusted=True), path)
    assert fit(OPTIMIZERS[name], 2, path, [CheckTrainingState(path)]).global_step == 4


def changed(saved, name, change, tmp_path):
    checkpoint = copy.deepcopy(load_checkpoint(saved / f"{name}.ckpt"))
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "crafted.ckpt")
    return tmp_path / "crafted.ckpt"


@pytest.mark.parametrize(
    "change",
    [
        lambda state, groups: [
            entry.update(exp_avg=torch.zeros(1), exp_avg_sq=torch.zeros(1)) for entry in state.values()
        ],
        lambda state, groups: [entry.update(exp_avg=torch.zeros(0)) for entry in state.values()],
        lambda state, groups: [entry.update(exp_avg=entry["exp_avg"].to_sparse()) for entry in state.values()],
        lambda state, groups: state.update({7: {}}),
        lambda state, groups: state.update({"x": {}}),
        lambda state, groups: groups[0].update(lr="fast"),
        lambda state, groups: groups[0].update(betas=0.5),
        lambda state, groups: groups.__setitem__(0, 5),
    ],
    ids=["short", "empty", "sparse", "index", "name", "lr", "betas", "group"],
)
def test_states_that_do_not_fit_the_parameters(saved, tmp_path, change):
    """Kernels of torch's optimizers would read beyond such states: they are rejected."""

    def apply(checkpoint):
        state = checkpoint["optimizer_states"][0]
        change(state["state"], state["param_groups"])

    path = changed(saved, "adam", apply, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        fit(OPTIMIZERS["adam"], 2, path, [CheckTrainingState(path)])


def test_a_file_does_not_say_how_a_step_is_computed(saved, tmp_path):
    """`fused` and similar options are those of the present run, although torch loads them from the state."""
    path = changed(saved, "adam", lambda c: c["optimizer_states"][0]["param_groups"][0].update(fused=True), tmp_path)
    trainer = fit(OPTIMIZERS["adam"], 2, path, [CheckTrainingState(path)])
    assert not trainer.optimizers[0].param_groups[0]["fused"]


def test_schedulers_keep_their_methods(saved, tmp_path):
    """torch would make every key of the state an attribute: unknown keys are rejected."""
    path = changed(saved, "sgd", lambda c: c["lr_schedulers"][0].update(get_lr=3), tmp_path)
    with pytest.raises(CheckpointError, match="StepLR has no such get_lr"):
        fit(OPTIMIZERS["sgd"], 2, path, [CheckTrainingState(path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(epoch="x"), "its epoch is 'x'"),
        (lambda c: c.update(global_step=-5), "its global_step is -5"),
        (lambda c: c.update(loops=[]), "its loops is a list"),
        (lambda c: c.update(callbacks=[]), "its callbacks is a list"),
        (lambda c: c.pop("callbacks"), "has no states of callbacks"),
        (lambda c: c.update(callbacks={"X": []}), "its callbacks.X is a list"),
        (lambda c: c.update(optimizer_states={}), "its optimizer_states is a dict"),
        (lambda c: c.update({"pytorch-lightning_version": "\x1b"}), "its pytorch-lightning_version is"),
        (
            lambda c: c["loops"]["fit_loop"]["epoch_progress"]["current"].update(completed=-(10**18)),
            r"its loops\.fit_loop\.epoch_progress\.current\.completed is -1000000000000000000",
        ),
        (lambda c: c.update(state_dict=[]), "its state_dict is a list"),
        (lambda c: c["state_dict"].update(x=torch.zeros(2).to_sparse()), "x must be a plain tensor on the CPU"),
    ],
)
def test_entries_of_other_kinds(saved, change, message):
    """The error names the entry, before a training hangs or fails with a traceback."""
    checkpoint = copy.deepcopy(load_checkpoint(saved / "adam.ckpt"))
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        check_training_state(checkpoint, "file.ckpt")
