"""The callback Distil: the model learns a teacher's outputs, in any training step that returns a loss."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from pruned_trainings import Module, Same, fit, loader, seeded
from support.trainers import bare_trainer
from torch import nn

from lightkit.callbacks import FuseKernels, LeanLoop
from lightkit.compress import Distil, Prune, Sparsify
from lightkit.errors import CheckpointError, ConfigError


def outputs(net):
    return net.eval()(next(iter(loader()))[0])


def test_learns_the_teacher():
    """With the whole weight on the distance, the model comes to compute what the teacher does, and not the labels."""
    torch.manual_seed(5)
    teacher = copy.deepcopy(Module().net)
    before = copy.deepcopy(teacher.state_dict())
    module = seeded()
    far = (outputs(module.net).softmax(1) - outputs(teacher).softmax(1)).abs().mean()
    fit(module, Distil(teacher, weight=1.0, temperature=1.0), LeanLoop(), epochs=30)
    near = (outputs(module.net).softmax(1) - outputs(teacher).softmax(1)).abs().mean()
    assert near < far / 3
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert "training_step" not in vars(module) and not module.net._forward_hooks


@pytest.mark.parametrize("callbacks", [[], [LeanLoop()], [FuseKernels()]], ids=["none", "lean", "fused"])
def test_loss(callbacks):
    """The gradient of a step is that of both parts, as the formula has them."""
    torch.manual_seed(5)
    teacher = copy.deepcopy(Module().net)
    make = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    module, reference = seeded(make), seeded(make)
    x, y = next(iter(loader()))
    trainer = bare_trainer(Distil(teacher, 0.6, 2.0), *callbacks, max_steps=1, max_epochs=-1, num_sanity_val_steps=0)
    trainer.fit(module, loader())
    logits = reference.net(x)
    soft = nn.functional.kl_div((logits / 2).log_softmax(1), (teacher(x) / 2).softmax(1), reduction="batchmean")
    (0.4 * nn.functional.cross_entropy(logits, y) + 0.6 * 4 * soft).backward()
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert trainer.callback_metrics["train/distillation"] == pytest.approx(4 * float(soft), rel=1e-4)


def test_dict_and_values():
    """A step may return a dict; the distance of values is the mean squared error."""

    class Dict(Module):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "more": 1}

    torch.manual_seed(0)
    module = Dict(lambda p: torch.optim.SGD(p, lr=0.1))
    teacher = copy.deepcopy(module.net)
    with torch.no_grad():
        teacher[6].bias += 1
    trainer = bare_trainer(Distil(teacher, targets="values"), max_steps=1, max_epochs=-1, num_sanity_val_steps=0)
    trainer.fit(module, loader())
    assert trainer.callback_metrics["train/distillation"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("step", [5, 17])
def test_resumed(tmp_path, step):
    """The dense model teaches from the first round on; a resumed training has the same teacher, to the bit."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    def train(*more, ckpt_path=None):
        module = seeded()
        both = [Distil(), Prune(0.4, rounds=2), Sparsify(0.7, rounds=3)]
        trainer = bare_trainer(*both, *more, LeanLoop(), max_epochs=4, num_sanity_val_steps=0)
        trainer.fit(module, Same(), loader(), ckpt_path=ckpt_path)
        return module

    whole = train(Save())
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    module = train(ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in module.state_dict().items())


class Manual(Module):
    automatic_optimization = False


class Elsewhere(Module):
    """A step that does not call the module that `Distil` takes by itself."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("module", "distil", "expected"),
    [
        (Module, lambda: Distil(), "Distil has no teacher"),
        (Module, lambda: Distil(nn.Flatten()), r"the model returns \(8, 2\) and the teacher \(8, 64\)"),
        (Module, lambda: Distil(nn.Flatten(), module="body"), "module=body is no submodule of Module"),
        (Elsewhere, lambda: Distil(nn.Flatten()), "the training step does not call forward of the model"),
    ],
)
def test_refused(module, distil, expected):
    """What cannot be distilled is one line, and the module is as before."""
    module = module()
    with pytest.raises(ConfigError, match=expected):
        fit(module, distil())
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"teacher": "a.ckpt"}, "teacher must be a module or None"),
        ({"weight": 0}, "weight must be a number above 0 to 1"),
        ({"temperature": -1}, "temperature must be positive"),
        ({"targets": "x"}, "targets must be one of classes, values"),
    ],
)
def test_wrong_arguments(arguments, expected):
    """A wrong argument is named."""
    with pytest.raises(ConfigError, match=expected):
        Distil(**arguments)


def test_damaged_state():
    """A stranger's teacher must be tensors that fit the model."""
    with pytest.raises(CheckpointError, match="state of Distil"):
        Distil().load_state_dict({"teacher": [1]})
    distil = Distil()

    class Load(pl.Callback):
        def on_fit_start(self, *arguments):
            distil.load_state_dict({"teacher": {"0.weight": torch.zeros(16, 1, 2, 2)}})

    with pytest.raises(CheckpointError, match="the teacher in the checkpoint does not fit the model"):
        fit(seeded(), Load(), distil, Prune(0.5))
