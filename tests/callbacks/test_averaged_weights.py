"""Where an optimizer keeps averages of the weights, they are validated, tested and saved, and training goes on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from averaging import Net, batches
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.trainers import bare_trainer
from torch.utils.data import DataLoader, TensorDataset

import lightkit.optim
from lightkit.callbacks import AveragedWeights, LeanLoop
from lightkit.checkpoints import AtomicCheckpointIO, load_checkpoint
from lightkit.models import RNN
from lightkit.tasks import ForecastTask

DECAY = 0.5


def averaged(make=None):
    return Net(make or partial(lightkit.optim.SGD, lr=0.1, ema_decay=DECAY))


DATA = batches(2)


def fit(net, epochs, *callbacks, path=None, **options):
    trainer = bare_trainer(AveragedWeights(), *callbacks, max_epochs=epochs, plugins=[AtomicCheckpointIO()], **options)
    trainer.fit(net, DATA, DATA, ckpt_path=path)
    return trainer


def averages(weights):
    """Returns the average after each step, computed from the weights after each step."""
    found = [weights[0]]
    for weight in weights[1:]:
        found.append(DECAY * found[-1] + (1 - DECAY) * weight)
    return found


@pytest.mark.parametrize("loop", [[], [LeanLoop]])
def test_averages_are_used(tmp_path, loop):
    """Validations and tests have the averages, the steps the weights, and the checkpoint has both."""
    path = tmp_path / "last.ckpt"
    net = averaged()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer = fit(net, 3, *(callback() for callback in loop), saver, enable_checkpointing=True)
    checkpoint = load_checkpoint(path)
    raw = [*net.trained[1:], checkpoint["current_model_state"]["layer.weight"]]
    expected = averages(raw)
    # A validation has two batches; the sanity check precedes the first step.
    steps = (1, 1, 3, 3, 5, 5)
    assert all(torch.allclose(v, expected[step]) for v, step in zip(net.validated[2:], steps, strict=True))
    for name in ("layer.weight", "tied.weight"):
        assert torch.allclose(checkpoint["state_dict"][name], expected[5])
    assert not torch.equal(raw[5], expected[5])
    # After the training the module has the averages, and a test of a checkpoint those of the checkpoint.
    assert torch.allclose(net.weight(), expected[5])
    trainer.test(net, DATA, ckpt_path=path, verbose=False)
    trainer.test(net, DATA, verbose=False)
    assert all(torch.allclose(weight, expected[5]) for weight in net.tested)


def test_resume(tmp_path):
    """A resumed training goes on from the weights, and its averages from the averages: as in one go."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="first")
    first, whole, second = averaged(), averaged(), averaged()
    whole.load_state_dict(first.state_dict())
    fit(first, 2, saver, enable_checkpointing=True)
    fit(whole, 4)
    fit(second, 4, path=tmp_path / "first.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(second.trained, whole.trained[4:], strict=True))
    assert torch.equal(second.weight(), whole.weight())
    # A training without averages goes on from the weights, too.
    plain = averaged(partial(lightkit.optim.SGD, lr=0.1))
    fit(plain, 4, path=tmp_path / "first.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(plain.trained, whole.trained[4:], strict=True))


def test_weights_come_back_after_an_error():
    """A validation that fails leaves the weights of the training."""
    net = averaged()

    def fail(batch, batch_idx):
        if net.trained:
            raise KeyError("validation")

    net.validation_step = fail
    with pytest.raises(KeyError, match="validation"):
        fit(net, 1)
    # The weight is that after the second step, which minimises the same loss once more.
    optimizer = net.trainer.optimizers[0]
    assert not torch.equal(net.weight(), optimizer.averages()[net.layer.weight])


def test_without_averages(tmp_path):
    """Without averages, and with other optimizers, a checkpoint has one set of weights."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="plain")
    for make in (partial(lightkit.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1)):
        net = averaged(make)
        fit(net, 1, saver, enable_checkpointing=True)
        assert "current_model_state" not in load_checkpoint(tmp_path / "plain.ckpt")


@pytest.mark.parametrize("kind", ["of Lightning", "of the optimizer"])
def test_intervals_of_a_forecast(tmp_path, kind):
    """The intervals are those of the validated averages, in the checkpoint and after the training."""
    history, target = torch.randn(40, 6, 1, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    data = DataLoader(TensorDataset(history, target), batch_size=20)
    is_own = kind == "of the optimizer"
    make = partial(lightkit.optim.Adam, lr=0.01, ema_decay=0.9 if is_own else None)
    task = ForecastTask(RNN(1, 4, 2), 2, make)
    averaging = [AveragedWeights()] if is_own else [EMAWeightAveraging(decay=0.9)]
    saver = ModelCheckpoint(dirpath=tmp_path, filename="forecast")
    trainer = bare_trainer(*averaging, saver, max_epochs=2, enable_checkpointing=True)
    trainer.fit(task, data, data)
    saved = load_checkpoint(tmp_path / "forecast.ckpt")["state_dict"]["half_width"]
    assert saved.isfinite().all() and torch.equal(saved, task.half_width)
    errors = (task(history) - target).abs()
    inside = (errors <= saved).double().mean(dim=0)
    # The averages, with which the training ends, were validated on the same data.
    assert (inside >= 0.9).all() and (inside < 0.96).all()
