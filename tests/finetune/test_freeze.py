"""Frozen parameters stay as they are to the bit, and are trained from their epoch on, also after a resumption."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from support.trainers import bare_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import FuseKernels, LeanLoop
from lightkit.errors import ConfigError
from lightkit.finetune import Freeze
from lightkit.optim import SGD, Adam


class Module(pl.LightningModule):
    """A body with a batch norm and dropout, and a head; it keeps the state of each epoch."""

    def __init__(self, make=None):
        super().__init__()
        body = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)]
        self.model = nn.ModuleDict({"body": nn.Sequential(*body), "head": nn.Linear(6, 2)})
        self.make = make or (lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen[self.current_epoch] = [
            (m.training, p.requires_grad) for m in self.model["body"] for p in m.parameters()
        ]
        return nn.functional.cross_entropy(self.model["head"](self.model["body"](x)), y)

    def validation_step(self, batch, batch_idx):
        self.model["head"](self.model["body"](batch[0]))

    def configure_optimizers(self):
        return self.make(self.parameters())


def fit(module, *callbacks, epochs=3, ckpt_path=None, validate=True, **options):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
    loader = DataLoader(data, batch_size=8)
    trainer = bare_trainer(*callbacks, max_epochs=epochs, **options)
    trainer.fit(module, loader, loader if validate else None, ckpt_path=ckpt_path)
    return trainer


def copy(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("make", [None, lambda p: Adam(p, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.1)])
@pytest.mark.parametrize("callbacks", [[], [LeanLoop()], [FuseKernels()]], ids=["none", "lean", "fused"])
def test_frozen(make, callbacks):
    """Weights, running statistics and decay of a frozen body stand still; its dropout is off."""
    module = Module(make)
    before = copy(module)
    fit(module, Freeze("body.*"), *callbacks)
    assert changed(module, before) == {"model.head.weight", "model.head.bias"}
    assert module.seen == dict.fromkeys(range(3), [(False, False)] * 4)


def test_unfrozen_at_its_epoch(capsys):
    """From the epoch on the body is trained, in training mode, and not before."""
    module = Module()
    before = copy(module)
    fit(module, Freeze(["body"], {2: "body.*"}))
    assert module.seen == {0: [(False, False)] * 4, 1: [(False, False)] * 4, 2: [(True, True)] * 4}
    assert changed(module, before) == set(before)
    assert capsys.readouterr().out.splitlines() == ["frozen: 42 of 56 parameters", "epoch 3: 4 tensors unfrozen"]


def test_in_steps():
    """Parts are unfrozen one after the other; a module with a trained part is in training mode."""
    module = Module()
    fit(module, Freeze("body", {"1": ["body.1"], 2: ["body.0.weight"]}))
    linear = [module.seen[epoch][:2] for epoch in range(3)]
    assert linear == [[(False, False)] * 2, [(False, False)] * 2, [(True, True), (True, False)]]
    assert [module.seen[epoch][2] for epoch in range(3)] == [(False, False), (True, True), (True, True)]


@pytest.mark.parametrize("within_epoch", [False, True])
def test_resumed(tmp_path, within_epoch):
    """A resumed training is the uninterrupted one to the bit, from a frozen epoch and from a later one."""

    def freeze():
        return Freeze("body", {2: "body"})

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if within_epoch and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            if not within_epoch:
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def make():
        torch.manual_seed(0)
        module = Module(lambda p: Adam(p, lr=0.01))
        # The random numbers of dropout are not part of a checkpoint.
        module.model["body"][2].p = 0.0
        return module

    whole = make()
    fit(whole, freeze(), Save(), epochs=4, validate=False)
    for epoch in range(4 if within_epoch else 3):
        module = make()
        fit(module, freeze(), epochs=4, ckpt_path=tmp_path / f"{epoch}.ckpt", validate=False)
        assert module.seen == {later: whole.seen[later] for later in module.seen}
        # Within an epoch Lightning begins anew with the batches of a plain loader.
        assert within_epoch or not changed(module, whole.state_dict()), epoch


def test_an_optimizer_of_the_trained_parameters_alone():
    """The habit of filtering by requires_grad keeps the parameters that are trained later."""
    module = Module(lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1))
    before = copy(module)
    trainer = fit(module, Freeze("body", {1: "body.1"}), epochs=2)
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 4
    assert {name for name in changed(module, before) if "body.0" in name} == set()
    assert "model.body.1.weight" in changed(module, before)


def test_layers_that_are_made_in_setup():
    """A module may make its layers when it knows the data: the patterns are read after that."""

    class Late(Module):
        def setup(self, stage):
            self.model["extra"] = nn.Linear(3, 3)

    module = Late()
    fit(module, Freeze("extra"))
    assert not any(p.requires_grad for p in module.model["extra"].parameters())


def test_what_was_in_evaluation_mode_stays_there():
    """A module that its program keeps in evaluation mode is not put into training mode."""
    module = Module()
    module.model["body"][1].eval()
    fit(module, Freeze("body", {1: "body"}))
    assert module.seen[2] == [(True, True)] * 2 + [(False, True)] * 2


@pytest.mark.parametrize(
    ("patterns", "unfreeze", "expected"),
    [
        (["bdy.*"], None, r"freeze: 'bdy.\*' matches no parameter or module; did you mean body"),
        (["nothing.at.all"], None, "matches no parameter or module; there are body, head"),
        (["body"], {1: "head"}, "unfreeze after epoch 1: 'head' matches nothing that is frozen"),
        (["body"], {1: "hed"}, "unfreeze after epoch 1: 'hed' matches no parameter or module; did you mean head"),
        (["model"], None, "freeze leaves no parameter to train in epoch 0"),
        ([], {1: "body"}, "freeze names no"),
        (3, None, "freeze must be a list of patterns of names, such as"),
        ([""], None, "freeze must be a list of patterns of names"),
        ("body", {0: "body"}, "unfreeze must have numbers of finished epochs, at least 1, got 0"),
        ("body", {True: "body"}, "at least 1, got True"),
        ("body", {"soon": "body"}, "at least 1, got 'soon'"),
        ("body", {1: 3}, "unfreeze after epoch 1 must be a list of patterns"),
        ("body", ["body"], "unfreeze must have patterns by epoch"),
    ],
)
def test_mistakes(patterns, unfreeze, expected):
    """A mistake is one line before the first step."""
    with pytest.raises(ConfigError, match=expected):
        fit(Module(), Freeze(patterns, unfreeze))


def test_a_parameter_of_no_optimizer():
    """A parameter that no optimizer has would stay as it is after its epoch, unnoticed."""
    module = Module()
    module.make = lambda parameters: torch.optim.SGD(module.model["head"].parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"unfreeze: model.body.0.bias is in no optimizer"):
        fit(module, Freeze("body", {1: "body"}))
    fit(module, Freeze("body"))


def test_an_epoch_that_never_comes():
    """The training ends before the epoch: a warning says so, since a longer one may follow."""
    with pytest.warns(UserWarning, match=r"unfreeze=\{3: ...\} has no effect: the training ends after 3 epochs"):
        fit(Module(), Freeze("body", {3: "body"}))
