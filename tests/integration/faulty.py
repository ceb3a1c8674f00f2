"""A callback that makes one process of a job fail; configurations of the tests name it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from support.processes import servers_of

from lightkit.errors import DataError


class Faulty(Callback):
    """Makes ``rank`` fail at its third batch as ``what`` says; every rank writes its process id to ``directory``."""

    def __init__(self, what: str, directory: str, rank: int = 1) -> None:
        self.what = what
        self.directory = Path(directory)
        self.rank = rank

    def on_train_start(self, trainer, pl_module):
        (self.directory / f"rank{trainer.global_rank}.pid").write_text(str(os.getpid()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.what == "wait":
            time.sleep(0.1)
        if batch_idx != 3 or trainer.global_rank != self.rank:
            return
        if self.what == "data":
            raise DataError("sample 7 is damaged")
        if self.what == "fault":
            raise RuntimeError("a fault of the program")
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.what == "server":
            os.kill(servers_of(os.getpid())[0], signal.SIGKILL)
