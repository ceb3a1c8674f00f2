"""The mean of the last epochs is validated, saved, tested and resumed; before it everything is as without it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from averaging import Net, batches
from lightning.pytorch.callbacks import ModelCheckpoint
from support.trainers import bare_trainer

import lightkit.optim
from lightkit.callbacks import AveragedWeights, LeanLoop, StochasticWeightAveraging
from lightkit.checkpoints import AtomicCheckpointIO, load_checkpoint
from lightkit.errors import ConfigError

STEPS = 4


def averaged(decay=None):
    return Net(partial(lightkit.optim.SGD, lr=0.1, ema_decay=decay))


DATA, ONE = batches(STEPS), batches(1)


def fit(net, epochs, *callbacks, path=None, **options):
    callbacks = [AveragedWeights(), *callbacks]
    options = {"num_sanity_val_steps": 0, "max_epochs": epochs, "plugins": [AtomicCheckpointIO()], **options}
    trainer = bare_trainer(*callbacks, **options)
    trainer.fit(net, DATA, ONE, ckpt_path=path)
    return trainer


def ends(net):
    """Returns the weight at the end of each epoch but the last."""
    return [net.trained[i] for i in range(STEPS, len(net.trained), STEPS)]


@pytest.mark.parametrize("loop", [[], [LeanLoop]])
def test_mean(tmp_path, loop):
    """The validation of each averaged epoch has the mean that includes it, as the checkpoint and the module do."""
    torch.manual_seed(0)
    path = tmp_path / "last.ckpt"
    net = averaged()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer = fit(net, 4, *(make() for make in loop), StochasticWeightAveraging(0.5), saver, enable_checkpointing=True)
    checkpoint = load_checkpoint(path)
    weights = [*ends(net), checkpoint["current_model_state"]["layer.weight"]]
    mean = (weights[2] + weights[3]) / 2
    expected = [weights[0], weights[1], weights[2], mean]
    assert all(torch.allclose(a, b) for a, b in zip(net.validated, expected, strict=True))
    assert torch.allclose(checkpoint["state_dict"]["layer.weight"], mean) and torch.allclose(net.weight(), mean)
    assert not torch.allclose(mean, weights[3])
    trainer.test(net, ONE, verbose=False)
    assert torch.allclose(net.tested[0], mean)


def test_resume(tmp_path):
    """A training that resumes before or within the averaged epochs ends like one that was never interrupted."""
    torch.manual_seed(0)
    whole = averaged()
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    fit(whole, 5, StochasticWeightAveraging(2))
    for epochs in (1, 2, 4):
        first, second = averaged(), averaged()
        first.load_state_dict(state)
        saver = ModelCheckpoint(dirpath=tmp_path, filename=f"e{epochs}")
        fit(first, epochs, StochasticWeightAveraging(2), saver, enable_checkpointing=True)
        fit(second, 5, StochasticWeightAveraging(2), path=tmp_path / f"e{epochs}.ckpt")
        assert torch.allclose(second.weight(), whole.weight())
        assert torch.allclose(torch.cat(second.trained), torch.cat(whole.trained[epochs * STEPS :]))


@pytest.mark.parametrize(("start", "epochs"), [(0.9, 1), (7, 3)])
def test_without_averages(tmp_path, start, epochs):
    """A training that ends before the first averaged epoch keeps its own weights; the last epoch of a share counts."""
    net = averaged()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="a")
    fit(net, epochs, StochasticWeightAveraging(start), saver, enable_checkpointing=True)
    checkpoint = load_checkpoint(tmp_path / "a.ckpt")
    assert ("current_model_state" in checkpoint) == (start < 1)
    assert torch.equal(checkpoint["state_dict"]["layer.weight"], net.weight())
    assert not torch.equal(net.weight(), net.trained[0])


def test_limit_in_steps():
    """Where steps end the training, the share is one of steps, and the last step ends an epoch."""
    net = averaged()
    averaging = StochasticWeightAveraging(0.5)
    fit(net, -1, averaging, max_steps=2 * STEPS + 1)
    # The means are of the ends of the second and of the broken third epoch; the optimizer has the last weights no more.
    assert not torch.equal(net.weight(), net.trained[-1])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: StochasticWeightAveraging(-0.1), {}, "start must be a share from 0 to 1 or a whole number"),
        (lambda: StochasticWeightAveraging(1.5), {}, "got 1.5"),
        (lambda: StochasticWeightAveraging("late"), {}, "got 'late'"),
        (lambda: StochasticWeightAveraging(0.5), {"max_epochs": -1}, "which has no limit: set trainer.max_epochs"),
    ],
)
def test_wrong_arguments(make, options, message):
    """The error says what is wrong, before the first step."""
    net = averaged()
    with pytest.raises(ConfigError, match=message):
        fit(net, 1, make(), **options)
    assert not net.trained


def test_two_averages():
    """An optimizer that keeps averages excludes the callback, before the first step."""
    net = averaged(decay=0.5)
    with pytest.raises(ConfigError, match="two averages of the weights: choose one"):
        fit(net, 1, StochasticWeightAveraging())
    assert not net.trained
