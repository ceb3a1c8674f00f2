"""Writes ``train.log``: the output of the run from which a job resumes, if any, and then the output of the job."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig

from lightkit._util.output_log import OutputLog
from lightkit.app.run_records import OUTPUT, find_run


def start_log(log: OutputLog, config: DictConfig) -> None:
    """Begins to write what the process prints to ``train.log`` in the directory of the run.

    Args:
        log: the log, which has been entered.
        config: the configuration of the job, in which ``ckpt_path`` is the file from which the run resumes, or None.
    """
    path = Path(config.run_dir) / OUTPUT
    checkpoint = config.get("ckpt_path")
    before = None if checkpoint is None else find_run(Path(checkpoint))
    # Hydra makes an empty file.
    is_new = not path.exists() or path.stat().st_size == 0
    if before is not None and is_new and (source := before.directory / OUTPUT).is_file():
        # An error of the log must not end the training.
        with suppress(OSError):
            shutil.copyfile(source, path)
    log.open(path)
