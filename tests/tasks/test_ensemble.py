"""Ensembles: the mean of probabilities, of forecasts with their bounds, and of regressions in their units."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError

from lightkit.data import TensorBatches
from lightkit.errors import ConfigError
from lightkit.models import RNN, Ensemble, Transformer
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask, RegressionTask, ensemble


def run_test(task, *tensors):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return trainer.test(task, TensorBatches(tensors, 7), verbose=False)[0]


def classifiers(count=3):
    torch.manual_seed(0)
    metrics = {"accuracy": MulticlassAccuracy(4, average="micro")}
    return [ClassificationTask(nn.Linear(5, 4), metrics=metrics) for _ in range(count)]


def test_probabilities_are_averaged():
    """The softmax of the ensemble is the mean of the softmaxes, also where a model is certain."""
    models = [nn.Linear(5, 4, dtype=torch.float64) for _ in range(3)]
    models[0].weight.data *= 300
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.stack([model(x).softmax(dim=1) for model in models]).mean(dim=0)
    assert torch.allclose(Ensemble(models)(x).softmax(dim=1), expected, rtol=1e-12)
    assert Ensemble([nn.Linear(5, 4).half()])(torch.randn(2, 5).half()).dtype == torch.float32
    with pytest.raises(ValueError, match="at least one model, got none"):
        Ensemble([])


def test_classes():
    """Loss and metrics of the test are those of the mean probabilities."""
    tasks = classifiers()
    x, labels = torch.randn(40, 5), torch.arange(40) % 4
    mean = torch.stack([task.model(x).softmax(dim=1) for task in tasks]).mean(dim=0)
    combined = ensemble(tasks)
    assert torch.allclose(combined.predict_step(x, 0), mean, atol=1e-6)
    metrics = run_test(combined, x, labels)
    assert metrics["test/loss"] == pytest.approx(nn.functional.nll_loss(mean.log(), labels).item(), rel=1e-5)
    assert metrics["test/accuracy"] == pytest.approx((mean.argmax(dim=1) == labels).float().mean().item())


@pytest.mark.parametrize("relative", [True, False])
def test_forecasts(relative):
    """Forecasts of tasks with other scales are averaged in the units of the series, and so are the bounds."""
    torch.manual_seed(0)
    tasks = []
    for number in range(3):
        task = ForecastTask(RNN(1, 4, 2), 2, relative=relative, metrics={"mae": MeanAbsoluteError()})
        task.center.fill_(1e6 + 10 * number)
        task.scale.fill_(5.0 + number)
        task.half_width.copy_(torch.tensor([1.0, 2.0]) * (number + 1))
        tasks.append(task.eval())
    history = 1e6 + 10 * torch.randn(9, 6, 1, dtype=torch.float64)
    combined = ensemble(tasks)
    output = combined.predict_step(history, 0)
    for name in ("forecast", "lower", "upper"):
        mean = torch.stack([task.predict_step(history, 0)[name] for task in tasks]).mean(dim=0)
        assert torch.allclose(output[name], mean, rtol=1e-12)
    target = output["forecast"].detach() + 1.0
    metrics = run_test(combined, history, target)
    assert metrics["test/mae"] == pytest.approx(1.0, rel=1e-4) and metrics["test/coverage"] == 1.0
    assert metrics["test/loss"] == pytest.approx(1 / 36, rel=1e-4)


def test_regressions():
    """Predictions of tasks with other scales are averaged in the units of the targets."""
    torch.manual_seed(0)
    tasks = [RegressionTask(nn.Linear(3, 2), num_targets=2, metrics={"mae": MeanAbsoluteError()}) for _ in range(2)]
    tasks[1].center.fill_(100.0)
    tasks[1].scale.fill_(7.0)
    x = torch.randn(8, 3)
    mean = torch.stack([task(x) for task in tasks]).mean(dim=0)
    combined = ensemble(tasks)
    assert torch.allclose(combined.predict_step(x, 0), mean, rtol=1e-5)
    assert run_test(combined, x, mean.detach() - 2.0)["test/mae"] == pytest.approx(2.0, rel=1e-4)


def test_tasks_that_do_not_go_together():
    """One line says which tasks make no ensemble."""
    forecasters = [ForecastTask(RNN(1, 4, horizon), horizon) for horizon in (2, 3)]
    with pytest.raises(ConfigError, match="the same horizon, got 2 and 3"):
        ensemble(forecasters)
    with pytest.raises(ConfigError, match="tasks of one class, got ClassificationTask and ForecastTask"):
        ensemble([*classifiers(1), forecasters[0]])
    model = Transformer(vocab_size=256, dim=8, num_layers=1, num_heads=2, context=8)
    with pytest.raises(ConfigError, match="no ensemble of LanguageModelTask"):
        ensemble([LanguageModelTask(model)] * 2)
    with pytest.raises(ConfigError, match="at least one task, got none"):
        ensemble([])
