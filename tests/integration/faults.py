"""A callback that kills a process once in the middle of a training, and logs every start to a diary."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Faults(Callback):
    """Kills the process of ``rank`` in ``epoch`` once, and sleeps ``pause`` seconds at each batch.

    Epoch -1 is the test. ``seed`` restricts the kill to the run of that seed, ``batch`` to that batch of the epoch, and
    ``writing`` to the write of a checkpoint.
    """

    def __init__(
        self,
        directory: str,
        rank: int = -1,
        epoch: int = 0,
        batch: int = 0,
        pause: float = 0.0,
        seed: int | None = None,
        writing: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.rank, self.epoch, self.batch, self.pause, self.seed = rank, epoch, batch, pause, seed
        self.writing = writing
        self.is_first = True

    def _note(self, what, trainer):
        facts = {
            "what": what,
            "time": time.time(),
            "rank": trainer.global_rank,
            "world": trainer.world_size,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }
        # One short write is atomic, so that the lines of processes do not mix.
        with (self.directory / "diary").open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.is_first:
            self.is_first = False
            self._note("start", trainer)
        time.sleep(self.pause)
        if batch_idx == self.batch and not self.writing:
            self._kill(trainer, trainer.current_epoch)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.writing:
            # At fsync the temporary file is complete and not yet renamed.
            os.fsync = lambda descriptor: self._kill(trainer, trainer.current_epoch)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._kill(trainer, -1)

    def _kill(self, trainer, epoch):
        is_seed = self.seed is None or str(self.seed) == os.environ.get("PL_GLOBAL_SEED")
        if trainer.global_rank != self.rank or epoch != self.epoch or not is_seed:
            return
        try:
            (self.directory / "killed").touch(exist_ok=False)
        except FileExistsError:
            return
        self._note("kill", trainer)
        os.kill(os.getpid(), signal.SIGKILL)
