"""A callback that ends a process in the middle of a training, once, and keeps a diary of every start."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Faults(Callback):
    """Kills the process of ``rank`` in ``epoch``, if nothing was killed before; ``pause`` seconds a batch."""

    def __init__(self, directory: str, rank: int = -1, epoch: int = 0, pause: float = 0.0) -> None:
        self.directory = Path(directory)
        self.rank, self.epoch, self.pause = rank, epoch, pause
        self.is_first = True

    def _note(self, what, trainer):
        facts = {
            "what": what,
            "time": time.time(),
            "rank": trainer.global_rank,
            "world": trainer.world_size,
            "epoch": trainer.current_epoch,
        }
        # One write of a short line: processes do not mix theirs.
        with (self.directory / "diary").open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.is_first:
            self.is_first = False
            self._note("start", trainer)
        time.sleep(self.pause)
        if trainer.global_rank == self.rank and trainer.current_epoch == self.epoch:
            try:
                (self.directory / "killed").touch(exist_ok=False)
            except FileExistsError:
                return
            self._note("kill", trainer)
            os.kill(os.getpid(), signal.SIGKILL)
