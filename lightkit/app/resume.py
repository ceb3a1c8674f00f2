"""The checkpoint from which a training resumes: the search, the checks, and the logs that a new run takes over."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lightkit.app import run_files, run_records, run_search, schedulers
from lightkit.app.resumed_config import check_optimizer, saved_config
from lightkit.callbacks.averaged_weights import CURRENT_KEY
from lightkit.callbacks.save_metrics import EPOCH_METRICS_KEY, METRICS_KEY
from lightkit.checkpoints import check_weights, load_checkpoint
from lightkit.checkpoints.resumed_settings import ResumedSettings, changed_names
from lightkit.checkpoints.training_state import check_training_state, checked_weights
from lightkit.compress.widths import apply_widths
from lightkit.config import to_plain
from lightkit.errors import CheckpointError
from lightkit.loggers import CSVLogger


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint from which a training resumes.

    Args:
        path: the file of the checkpoint.
        checkpoint: the content of the file.
        run: the run that wrote the checkpoint; None if ``path`` lies in no run directory.
        settings: the callback that applies the settings of the job to the states of the checkpoint.
    """

    path: Path
    checkpoint: dict[str, Any]
    run: run_records.Run | None
    settings: ResumedSettings

    def steps(self) -> int:
        """Returns the number of logged training steps; Lightning's ``global_step`` counts each optimizer's steps."""
        return math.ceil(self.checkpoint["global_step"] / max(1, len(self.checkpoint.get("optimizer_states", []))))

    def metrics(self) -> dict[str, Any]:
        """Returns the metrics of the resumed run before its test: the last value that it logged, by metric name."""
        logged = self.checkpoint.get(METRICS_KEY)
        numbers = (int, float)
        logged = {k: v for k, v in logged.items() if type(v) in numbers} if isinstance(logged, dict) else {}
        if self.run is None:
            return logged
        return logged | run_files.read_if_newer(self.run.directory / run_files.METRICS, self.path)

    def continue_logs(self, loggers: Iterable[Logger], run_dir: Path) -> None:
        """Copies the rows of the resumed run's ``metrics.csv`` to the start of the new run's ``metrics.csv``.

        Args:
            loggers: the loggers of the new run.
            run_dir: the directory of the new run.
        """
        source = self.path.absolute().parent.parent if self.run is None else self.run.directory
        for logger in loggers:
            if isinstance(logger, CSVLogger):
                own = Path(logger.log_dir).absolute()
                # Both runs have the log at the same relative path; a log outside the run directory is shared.
                is_inside = own.is_relative_to(run_dir.absolute())
                directory = source / own.relative_to(run_dir.absolute()) if is_inside else own
                epoch = self.checkpoint.get(EPOCH_METRICS_KEY, {})
                last = epoch and {"epoch": self.checkpoint["epoch"], **epoch}
                logger.continue_from(directory / run_files.LOG, self.steps(), last)


def find_resume_point(config: DictConfig, task: pl.LightningModule) -> ResumePoint | None:
    """Returns the checkpoint that ``ckpt_path`` names, after a check that it fits the task.

    Args:
        config: the configuration of the job.
        task: the task of the job, whose weights have the shapes that the checkpoint must have.

    Returns:
        The checkpoint; None if ``ckpt_path`` is null.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another model, or its training is complete.
    """
    if config.ckpt_path is None:
        return None
    if config.ckpt_path == "last":
        # Only a program that calls `train` itself comes here: the command's leading process has replaced `last`.
        path = run_search.find_last(run_records.describe(config), config.name)
        print(f"continuing {path}")
    else:
        path = Path(config.ckpt_path)
    checkpoint = load_checkpoint(path, untrusted=True)
    # The callback that prunes takes the widths for the weights that are loaded later.
    apply_widths(task, checkpoint)
    for key in ("state_dict", CURRENT_KEY):
        if key in checkpoint:
            check_weights(task, {"state_dict": checked_weights({"state_dict": checkpoint[key]}, path)}, path)
    try:
        epochs_done = checkpoint["epoch"] + 1
        is_at_end = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be resumed: it has the weights but not the state of a training"
        ) from error
    check_training_state(checkpoint, path)
    settings = _settings(config, checkpoint, path)
    run = run_records.find_run(path)
    # A run without a report may resume after its last epoch, for the test and the report.
    has_report = run is None or run.is_finished
    is_own = path.absolute().is_relative_to(Path(config.run_dir).absolute())
    if not is_own and (
        limit := _reached_limit(config.trainer, epochs_done if is_at_end else 0, checkpoint, has_report)
    ):
        raise CheckpointError(f"{path} has completed {limit}")
    return ResumePoint(path, checkpoint, run, settings)


def _settings(config: DictConfig, checkpoint: dict[str, Any], path: Path) -> ResumedSettings:
    """Returns the callback that applies the settings of the job to the states of a checkpoint.

    Raises:
        CheckpointError: the optimizer of the job cannot go on from the states.
    """
    saved = saved_config(checkpoint)
    if not saved:
        return ResumedSettings(path)
    check_optimizer(config, saved, path)
    optimizer = to_plain(config.get("optim")) or {}
    # Another class may have further hyperparameters.
    same_class = optimizer.get("_target_") == saved["optim"].get("_target_")
    changed = changed_names(optimizer, saved["optim"]) if same_class else None
    schedules = [schedulers.settings(node) for node in (to_plain(config.get("scheduler")), saved["scheduler"])]
    return ResumedSettings(path, changed, bool(changed_names(*schedules)))


def _reached_limit(trainer: DictConfig, epochs: int, checkpoint: dict[str, Any], has_report: bool) -> str | None:
    """Returns the description of a limit of the training that a checkpoint has reached; None if it has reached none.

    Args:
        trainer: the configuration of the trainer.
        epochs: the number of finished epochs; 0 within an epoch.
        checkpoint: the content of the checkpoint.
        has_report: True if the run of the checkpoint has written its report. Without a report, a run that has exactly
            reached its limit resumes for the test and the report.
    """
    steps = checkpoint["global_step"]
    for unit, done, wanted in (("epoch", epochs, trainer.max_epochs), ("step", steps, trainer.get("max_steps"))):
        if 0 < (wanted or 0) <= done and (has_report or wanted < done):
            return (
                f"{done} {unit}s and trainer.max_{unit}s is {wanted}: nothing is left to train; pass "
                f"trainer.max_{unit}s={done + 1} or more"
            )
    return None
