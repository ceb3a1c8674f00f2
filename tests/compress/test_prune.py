"""The callback Prune: any training makes the model smaller, resumes to the bit, or is refused in one line."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from pruned_trainings import Module, Same, fit, loader, seeded
from support.trainers import bare_trainer
from torch import nn

from lightkit.callbacks import AveragedWeights, Checkpoint, FuseKernels, LeanLoop
from lightkit.checkpoints import load_checkpoint
from lightkit.compress import WIDTHS_KEY, Prune
from lightkit.errors import ConfigError
from lightkit.finetune import Freeze
from lightkit.nn import FusedSequential
from lightkit.optim import SGD, Adam


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_smaller(capsys):
    """A quarter of the multiply-adds is left, one line a round says where, and the model still learns."""
    module, prune = seeded(), Prune(0.25, rounds=2)
    before = size(module)
    trainer = fit(module, prune, epochs=8)
    assert prune.macs <= 0.25 * prune.dense_macs < 3 * prune.macs
    assert size(module) < before / 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("pruned to 2") and "net.4 " in "".join(lines)
    assert trainer.callback_metrics["val/loss"] < 0.3


OPTIMIZERS = {
    "lightkit Adam": None,
    "lightkit SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, max_grad_norm=1.0),
    "average": lambda p: Adam(p, lr=0.01, ema_decay=0.8),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("step", [3, 17, 20, 31])
def test_resumed(tmp_path, name, step):
    """A training that resumes before, between and after the rounds is the uninterrupted one to the bit."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    callbacks = lambda: [Prune(0.3, rounds=3), AveragedWeights()]  # noqa: E731
    whole = seeded(OPTIMIZERS[name])
    bare_trainer(*callbacks(), Save(), LeanLoop(), max_epochs=4, num_sanity_val_steps=0).fit(whole, Same(), loader())
    checkpoint = load_checkpoint(tmp_path / "x.ckpt")
    assert (WIDTHS_KEY in checkpoint) == (step > 10)
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    module = seeded(OPTIMIZERS[name])
    trainer = bare_trainer(*callbacks(), LeanLoop(), max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(module, Same(), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 32
    for key, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("options", "callbacks", "sequential"),
    [
        ({}, [FuseKernels], nn.Sequential),
        ({}, [LeanLoop], FusedSequential),
        ({}, [FuseKernels, LeanLoop], nn.Sequential),
        ({"precision": "bf16-mixed"}, [], FusedSequential),
        ({"precision": "bf16-true"}, [], nn.Sequential),
        ({"precision": "64-true"}, [], nn.Sequential),
        ({"accumulate_grad_batches": 2}, [LeanLoop], nn.Sequential),
        ({"gradient_clip_val": 0.5}, [], nn.Sequential),
    ],
    ids=["fused", "lean", "both", "bf16-mixed", "bf16-true", "64-true", "accumulate", "clip"],
)
def test_combined(options, callbacks, sequential):
    """Kernels, loops and precisions go on with the smaller model."""
    module, prune = seeded(lambda p: torch.optim.Adam(p, lr=0.01), sequential), Prune(0.3, rounds=2)
    trainer = fit(module, prune, *(callback() for callback in callbacks), epochs=6, **options)
    assert prune.macs < 0.31 * prune.dense_macs
    assert trainer.callback_metrics["val/loss"] < 0.6


def test_best_checkpoint(tmp_path):
    """The best checkpoint is one of the pruned model; a test with it, and with one from before, loads its widths."""

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, *arguments):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    module = seeded()
    best = Checkpoint(tmp_path, "best", monitor="val/loss", save_last=True)
    stopping = EarlyStopping("val/loss", patience=1)
    trainer = fit(module, Prune(0.3, rounds=2), best, stopping, Save(), epochs=6, enable_checkpointing=True)
    assert load_checkpoint(best.best_model_path)[WIDTHS_KEY]
    shapes = {name: p.shape for name, p in module.named_parameters()}
    trainer.test(module, loader(), ckpt_path=best.best_model_path, verbose=False)
    assert {name: p.shape for name, p in module.named_parameters()} == shapes
    trainer.test(module, loader(), ckpt_path=str(tmp_path / "0.ckpt"), verbose=False)
    assert module.net[4].out_features == 24


def test_frozen_layers_stay():
    """Layers that are not trained have no importances, and keep their widths."""
    module = seeded()
    fit(module, Freeze("0"), Prune(0.8, rounds=1), epochs=4)
    assert module.net[0].out_channels == 16 and module.net[4].out_features < 24


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_steps_that_overflow_do_not_count(value):
    """Gradients that are not finite, as in the first steps of 16-mixed, leave the importances of the other steps."""

    class Overflow(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                for parameter in pl_module.parameters():
                    parameter.grad.fill_(value)

    module, prune = seeded(lambda p: Adam(p, lr=0.01, skip_nonfinite=True)), Prune(0.3, rounds=1, multiple=1)
    fit(module, Overflow(), prune)
    assert 1 < module.net[0].out_channels < 16 and 2 < module.net[4].out_features < 24


def test_layers_called_by_the_step():
    """Layers that a step calls one by one have no call around them that could prove their removal."""

    class Parts(Module):
        def training_step(self, batch, batch_idx):
            x = self.net[3](self.net[2](self.net[1](self.net[0](batch[0]))))
            return nn.functional.cross_entropy(self.net[6](self.net[5](self.net[4](x))), batch[1])

    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="no layer can lose units"):
        fit(Parts(), Prune(0.5))


def test_two_networks_of_one_shape():
    """A step may call several networks, whose layers have the same names below them, and other widths."""

    class Two(Module):
        def __init__(self):
            super().__init__()
            self.other = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 2))
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 2))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])

    torch.manual_seed(0)
    module, prune = Two(), Prune(0.5, rounds=2)
    fit(module, prune)
    assert prune.widths == {
        "net.1": (12, module.net[1].out_features),
        "other.1": (40, module.other[1].out_features),
    }
    assert prune.state_dict()["dense_counts"] == {"net.1": 12, "other.1": 40}


class Calls(Module):
    """A module whose step calls a model, and what else ``calls`` names."""

    def __init__(self, *calls):
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 24)))
        self.net.extend([nn.ReLU(), nn.Linear(24, 2)])
        self.calls = calls

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        outputs = [self.get_submodule(name)(batch[0]) for name in self.calls]
        return sum(nn.functional.cross_entropy(output, batch[1]) for output in outputs)


class CallsWithBackbone(Calls):
    """Such a module that has a part of its model by a name of its own, and in another model."""

    def __init__(self, *calls):
        super().__init__(*calls)
        self.backbone = self.net[0]
        self.other = nn.Sequential(self.backbone, nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 2))


@pytest.mark.parametrize(
    ("module", "widths", "macs"),
    [
        (Calls("", "net"), {"net.0.1", "net.0.3"}, 64 * 40 + 40 * 24 + 24 * 2),
        (Calls("net", ""), {"net.0.1", "net.0.3"}, 64 * 40 + 40 * 24 + 24 * 2),
        (CallsWithBackbone("net", "backbone"), {"net.0.1"}, 64 * 40 + 40 * 24 + 24 * 2),
        (CallsWithBackbone("net", "other"), {"other.2"}, 2 * (64 * 40 + 40 * 24) + 24 * 2 + 24 * 12 + 12 * 2),
    ],
    ids=["module and model", "model and module", "model and part", "two models with a part"],
)
def test_parts_of_called_networks(module, widths, macs):
    """A network within a called one counts once, and units stay that not all calls can lose."""
    prune = Prune(0.98, rounds=1, multiple=1)
    fit(module, prune)
    assert prune.widths.keys() == widths
    assert prune.dense_macs == macs > prune.macs


class Mean(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return True


@pytest.mark.parametrize(
    ("make", "callbacks", "options", "expected"),
    [
        (lambda p: torch.optim.LBFGS(p), [], {}, "LBFGS"),
        (None, [Mean()], {}, "Mean would average the weights of models of several sizes"),
        (None, [], {"max_epochs": -1, "max_time": {"seconds": 20}}, "needs the length of the training"),
        (None, [], {"max_steps": 4}, "rounds need more than the 4 steps"),
    ],
)
def test_refused(make, callbacks, options, expected):
    """What cannot go together is one line before the training, and the module stays as it is."""
    module = seeded(make)
    before = copy.deepcopy(module.state_dict())
    trainer = bare_trainer(Prune(0.3), *callbacks, **{"max_epochs": 4, "num_sanity_val_steps": 0, **options})
    with pytest.raises(ConfigError, match=expected):
        trainer.fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_too_small():
    """A share that the fixed layers already exceed is refused in the first step."""
    with pytest.raises(ConfigError, match=r"keep_macs=0\.01 is less than can be kept"):
        fit(seeded(), Prune(0.01))


def test_compiled():
    """A compiled module has the code of its widths."""
    module = seeded()
    module.net.compile(backend="eager")
    with pytest.raises(ConfigError, match="Prune: net is compiled"):
        fit(module, Prune(0.3))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"keep_macs": 0}, "keep_macs must be a number above 0 to 1, got 0"),
        ({"keep_macs": "a"}, "keep_macs must be a number above 0 to 1, got 'a'"),
        ({"start": 2}, "start must be a number from 0 to 1"),
        ({"start": 0.8, "end": 0.5}, "end must be at least start, which is 0.8, got 0.5"),
        ({"rounds": 0}, "rounds must be a whole number, at least 1"),
    ],
)
def test_wrong_arguments(arguments, expected):
    """A wrong argument is named."""
    with pytest.raises(ConfigError, match=expected):
        Prune(**arguments)
