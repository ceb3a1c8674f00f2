"""The classification task in a real Trainer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.trainers import bare_trainer
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightkit.callbacks import LeanLoop
from lightkit.data import TensorBatches
from lightkit.models import RNN
from lightkit.nn import CrossEntropyLoss
from lightkit.optim import SGD
from lightkit.tasks import ClassificationTask


def separable_batches(count=200, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=generator)
    inputs = nn.functional.one_hot(labels, classes).float() * 3 + torch.randn(count, classes, generator=generator)
    return inputs, labels


def test_binds_any_model_loss_optimizer_scheduler_and_metrics():
    """All parts can be exchanged, the model learns, and every metric is logged under its name."""
    inputs, labels = separable_batches()
    task = ClassificationTask(
        nn.Linear(3, 3),
        optimizer=partial(SGD, lr=0.5, momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        metrics={"accuracy": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3)},
    )
    runner = bare_trainer(max_epochs=3)
    runner.fit(task, TensorBatches([inputs, labels], 20, shuffle=True), TensorBatches([inputs, labels], 64))
    assert runner.callback_metrics.keys() >= {"train/loss", "val/loss", "val/accuracy", "val/f1"}
    assert runner.optimizers[0].param_groups[0]["lr"] == 0.5 * 0.5**3
    (result,) = runner.test(task, TensorBatches([inputs, labels], 64), verbose=False)
    exact = (task(inputs).argmax(1) == labels).float().mean().item()
    assert result["test/accuracy"] == pytest.approx(exact)
    assert exact > 0.9


def test_metrics_weigh_batches_by_their_size():
    """The logged loss of uneven batches is that of the whole set."""
    inputs, labels = separable_batches(100)
    task = ClassificationTask(nn.Linear(3, 3))
    (result,) = bare_trainer().test(task, TensorBatches([inputs, labels], 33), verbose=False)
    assert result["test/loss"] == pytest.approx(nn.functional.cross_entropy(task(inputs), labels).item(), rel=1e-5)


def test_plateau_scheduler_watches_the_validation_loss():
    """ReduceLROnPlateau, which needs a monitored value, works without further settings."""
    inputs, labels = separable_batches()
    task = ClassificationTask(
        nn.Linear(3, 3), scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0)
    )
    runner = bare_trainer(max_epochs=3)
    runner.fit(task, TensorBatches([inputs, labels], 50), TensorBatches([inputs, labels], 50))
    assert runner.optimizers[0].param_groups[0]["lr"] < 1e-3


def test_predict_gives_probabilities():
    """Prediction takes inputs with or without labels and returns probabilities."""
    inputs, labels = separable_batches(10)
    task = ClassificationTask(nn.Linear(3, 3))
    alone, paired = task.predict_step(inputs, 0), task.predict_step((inputs, labels), 0)
    assert torch.equal(alone, paired)
    torch.testing.assert_close(alone.sum(1), torch.ones(10))


def test_sequences_of_different_lengths():
    """A model of sequences gets them and their lengths, and the padding has no effect."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (200,))
    labels = torch.randint(0, 2, (200,))
    # The last valid step tells the class; the padding would make every loss NaN.
    sequences = torch.full((200, 8, 1), torch.nan)
    for row, length in enumerate(lengths.tolist()):
        sequences[row, :length] = torch.randn(length, 1)
        sequences[row, length - 1] = 3.0 if labels[row] else -3.0
    task = ClassificationTask(
        RNN(1, 8, num_outputs=2),
        optimizer=partial(torch.optim.Adam, lr=0.03),
        metrics={"accuracy": MulticlassAccuracy(2, average="micro")},
    )
    runner = bare_trainer(max_epochs=6)
    batch = [sequences, lengths, labels]
    runner.fit(task, TensorBatches(batch, 20, shuffle=True), TensorBatches(batch, 64))
    assert runner.callback_metrics["val/accuracy"] > 0.95
    assert runner.callback_metrics["train/loss"].isfinite()
    assert task.predict_step((sequences, lengths, labels), 0).shape == (200, 2)


class Recorded(nn.Linear):
    """A layer that keeps the logits of its training passes."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        if self.training:
            vars(self).setdefault("seen", []).append(logits.detach().clone())
        return logits


@pytest.mark.parametrize("callbacks", [[], [LeanLoop()]], ids=["stock", "lean"])
@pytest.mark.parametrize("limits", [{}, {"max_steps": 3}, {"precision": "bf16-mixed"}], ids=["whole", "short", "bf16"])
def test_training_accuracy(callbacks, limits):
    """``train/accuracy`` is the share of right samples in the steps of the epoch, also of one that ends early."""
    inputs, labels = separable_batches(90)
    model = Recorded(3, 3)
    loss = CrossEntropyLoss(inplace=True)
    task = ClassificationTask(model, loss=loss, metrics={"accuracy": MulticlassAccuracy(3, average="micro")})
    runner = bare_trainer(callbacks=callbacks, **limits)
    runner.fit(task, TensorBatches([inputs, labels], 20), TensorBatches([inputs, labels], 64))
    predicted = torch.cat(model.seen).argmax(1)
    assert len(predicted) == (60 if "max_steps" in limits else 90)
    exact = (predicted == labels[: len(predicted)]).double().mean().item()
    assert runner.callback_metrics["train/accuracy"].item() == pytest.approx(exact)


@pytest.mark.parametrize("metric", [None, MulticlassAccuracy(3, average="macro"), MulticlassAccuracy(3, top_k=2)])
def test_no_training_accuracy(metric):
    """A run whose validation has no share of right samples has none of the training, which would be another figure."""
    inputs, labels = separable_batches(40)
    task = ClassificationTask(nn.Linear(3, 3), metrics={} if metric is None else {"accuracy": metric})
    runner = bare_trainer()
    runner.fit(task, TensorBatches([inputs, labels], 20), TensorBatches([inputs, labels], 64))
    assert "train/accuracy" not in runner.callback_metrics
