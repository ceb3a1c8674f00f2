"""The search for the smallest model after a training: ``compress.max_drop`` of `lightkit.train`."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

from lightkit.app.compressing import compress_checkpoint
from lightkit.app.compression_job import lacking_loader
from lightkit.app.compression_outcome import CompressionOutcome
from lightkit.app.compression_report import ACCURACY, print_comparison
from lightkit.app.compression_request import CompressionRequest
from lightkit.app.factory import TrainingJob
from lightkit.app.report.section import describe_error
from lightkit.config import to_plain
from lightkit.errors import ConfigError, LightkitError
from lightkit.tasks.task import Task


def check_job(job: TrainingJob) -> None:
    """Rejects a job whose model cannot be searched for a smaller one after the training.

    Raises:
        ConfigError: the job has several processes, a task of another package or without accuracy, or no checkpoint.
    """
    reason = None
    if job.trainer.world_size != 1:
        reason = f"the job has {job.trainer.world_size} processes; compress its checkpoint with lightkit.compress"
    elif not isinstance(job.task, Task):
        reason = f"{type(job.task).__name__} is no task of lightkit.tasks"
    elif (to_plain(job.config.task).get("metrics") or {}).get(ACCURACY) is None:
        reason = "the task has no metric accuracy"
    elif (lacking := lacking_loader(job.data, "val_dataloader", "test_dataloader")) is not None:
        reason = f"{type(job.data).__name__} has no {lacking}"
    elif not hasattr(job.trainer.checkpoint_callback, "best_model_path"):
        reason = "the job has no callback that saves the best checkpoint; leave callbacks=default in"
    if reason is not None:
        raise ConfigError(f"compress.max_drop: {reason}")


def compress_trained(job: TrainingJob, request: CompressionRequest) -> CompressionOutcome | None:
    """Searches for the smallest model from the best checkpoint of a training, and prints how it compares.

    A search that fails ends in a warning and None.

    Args:
        job: the job after its training.
        request: the search, with ``output``: see `lightkit.app.compression.find_request`.
    """
    best = Path(getattr(job.trainer.checkpoint_callback, "best_model_path", ""))
    directory = Path(request.output or "")
    try:
        if directory.exists():
            # The search of the same job, before it was resumed.
            shutil.rmtree(directory)
        if not best.is_file():
            raise ConfigError("the training has saved no best checkpoint")
        comparison = compress_checkpoint(best, request)
    except Exception as error:
        # The training is done, and must not end in an error.
        reason = error if isinstance(error, LightkitError) else describe_error(error)
        warnings.warn(f"no smaller model: {reason}", stacklevel=2)
        return None
    print_comparison(comparison)
    accuracy = comparison.columns["compressed"].get(f"test/{ACCURACY}")
    return None if comparison.outcome is None else replace(comparison.outcome, accuracy=accuracy)
