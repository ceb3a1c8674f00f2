"""Gradient descent, which is SGD on the whole training set: one step of the experiment against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.commands import run
from torch.func import functional_call

from lightkit.checkpoints import load_checkpoint
from lightkit.data import MNIST5k
from lightkit.data.images import to_input
from lightkit.models import CNN

pytestmark = pytest.mark.slow


def weights_after_one_epoch(directory, lr):
    """Returns the model's weights in the last checkpoint of a job of one epoch."""
    arguments = ["+experiment=gradient_descent", "trainer.max_epochs=1", f"optim.lr={lr}", "test=false"]
    run("train", *arguments, f"hydra.run.dir={directory}", cwd=directory.parent, status=0)
    checkpoint = load_checkpoint(directory / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 1
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def test_one_step_follows_the_gradient_of_the_whole_loss(tmp_path):
    """One step gives theta - lr * gradient of the mean loss of all 3,600 training digits, computed in float64."""
    lr = 0.5
    before = weights_after_one_epoch(tmp_path / "still", lr=0.0)
    after = weights_after_one_epoch(tmp_path / "step", lr=lr)

    data = MNIST5k(batch_size=450, validation_size=400, seed=0)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(labels) == 3600
    exact = {name: value.double().requires_grad_() for name, value in before.items()}
    logits = functional_call(CNN(blocks="torch").double(), exact, (to_input(images).double(),))
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(exact.values()))
    for (name, value), gradient in zip(exact.items(), gradients, strict=True):
        expected = value.detach() - lr * gradient
        moved = (after[name].double() - before[name].double()).abs().max()
        assert moved > 1e-5, name
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=2e-6)
