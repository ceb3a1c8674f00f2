"""The files that `lightkit.fit` leaves in ``run_dir``: logs, checkpoints, metrics, and the report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback

from lightkit._util.atomic_write import write_text_atomically
from lightkit.callbacks import Checkpoint, TestRecorder
from lightkit.data import ImageDataModule
from lightkit.errors import DataError
from lightkit.loops.hooks import is_overridden


class RunDirectory:
    """The directory of a fit.

    Args:
        path: the directory.
        data: the data module of the fit.
        settings: the arguments of the fit as plain values, which ``config.yaml`` gets.
    """

    def __init__(self, path: Path, data: pl.LightningDataModule, settings: dict[str, Any]) -> None:
        self.path = path
        self._data = data
        self._settings = settings
        self._recorder = TestRecorder()
        self._started = time.perf_counter()

    def callbacks(self) -> list[Callback]:
        """Returns the callbacks that write checkpoints, and record the predictions for the report."""
        loader: Any = self._data.val_dataloader()
        monitor = "val/loss" if not isinstance(loader, list) or loader else None
        folder = self.path / "checkpoints"
        return [Checkpoint(dirpath=folder, filename="best", monitor=monitor, save_last=True), self._recorder]

    def write_report(self, trainer: pl.Trainer, task: pl.LightningModule, metrics: dict[str, float]) -> None:
        """Measures on the held-out samples, and writes the configuration, the metrics and the report.

        Args:
            trainer: the trainer after the fit.
            task: the trained task.
            metrics: the metrics of the last epoch by name.
        """
        # The application's report needs its records of a run, and no Hydra.
        from lightkit.app import report, run_files

        if self._can_test(task):
            trainer.test(task, datamodule=self._data, verbose=False)
            metrics = metrics | {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        metrics = metrics | {"epochs": trainer.current_epoch, "wall_seconds": time.perf_counter() - self._started}
        write_text_atomically(self.path / run_files.CONFIG, yaml.safe_dump({"name": self.path.name, **self._settings}))
        run_files.write_json(self.path / run_files.ENVIRONMENT, run_files.environment())
        run_files.write_json(self.path / run_files.METRICS, metrics)
        report.write(self.path, metrics, task, self._data, self._recorder.result())

    def _can_test(self, task: pl.LightningModule) -> bool:
        """Returns True if the task has a test step, and the data module has samples for it."""
        if not is_overridden("test_step", task, pl.LightningModule):
            return False
        if not is_overridden("test_dataloader", self._data, pl.LightningDataModule):
            return False
        if isinstance(self._data, ImageDataModule):
            # The test set of a folder is read only now.
            self._data.setup("test")
        try:
            loader: Any = self._data.test_dataloader()
        except DataError:
            return False
        return not hasattr(loader, "__len__") or len(loader) > 0
