"""The progress of a training in a terminal and in a log file."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lightkit.callbacks import Progress


def trainer(**metrics):
    """Returns what the callback reads of a trainer."""
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    shown = {name: value.item() for name, value in values.items()}
    options = {
        "is_global_zero": True,
        "max_epochs": 5,
        "current_epoch": 1,
        "loggers": [],
        "progress_bar_metrics": shown,
    }
    return SimpleNamespace(callback_metrics=values, **options)


def test_a_line_of_an_epoch(capsys):
    """A log file has the metrics with four significant digits, and no control characters of their names."""
    metrics = {"train/loss_epoch": 1e-5, "val/loss": float("nan"), "val/Rate [/s]\x1b": 12345.6}
    progress = Progress()
    progress.on_train_epoch_end(trainer(**metrics), None)
    assert capsys.readouterr().out == "epoch 2/5  train/loss 1.000e-05  val/loss nan  val/Rate [/s]\\x1b 12346\n"


def test_metrics_of_the_bar():
    """The bar shows small and large values as they are, not as 0.000."""
    metrics = Progress().get_metrics(trainer(loss=1e-5, large=1e12, none=float("inf")), None)
    assert metrics == {"loss": "1.000e-05", "large": "1.000e+12", "none": "inf"}


def test_no_standard_output(monkeypatch):
    """A process without standard output, as of ``>&-``, has no bar."""
    monkeypatch.setattr("sys.stdout", None)
    assert Progress().is_disabled
