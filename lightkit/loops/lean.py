"""Lightning's training loop, with most of its steps taken by `LeanStep`."""

from __future__ import annotations

from contextlib import suppress

from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lightkit.loops.graphs import PassGraphs
from lightkit.loops.log import StepLogger, fast_log
from lightkit.loops.step import LeanStep


class LeanEpochLoop(_TrainingEpochLoop):
    """Runs an epoch as Lightning's own loop does, to the bit and to the counter, with less work between the steps.

    The first and the last batch of an epoch, the batch before a validation, the last step of a training and
    everything at a restart go through Lightning's own code. What lies between is taken by `LeanStep`, which calls
    the same hooks in the same order where somebody implements them.

    It has the state of Lightning's loop and no other: a loop becomes one by its ``__class__``.

    Attributes:
        graphs: take the passes of the steps between, where they can; None for none.
    """

    graphs: PassGraphs | None = None

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Runs one epoch."""
        self.reset()
        self.on_run_start(data_fetcher)
        log = StepLogger(self.trainer)
        while not self.done:
            try:
                ahead = self._lean_steps_ahead(data_fetcher)
                if ahead > 0:
                    self._take(LeanStep(self.trainer, log, self.graphs), ahead, data_fetcher)
                else:
                    self.advance(data_fetcher)
                    self.on_advance_end(data_fetcher)
            except StopIteration:
                break
            finally:
                self.on_iteration_done()

    def _take(self, step: LeanStep, count: int, data_fetcher: _DataFetcher) -> None:
        trainer = self.trainer
        try:
            with fast_log(trainer.lightning_module, self._results):
                for _ in range(count):
                    step(data_fetcher)
                    if trainer.should_stop or trainer.received_sigterm:
                        break
                    step.advance_end()
        except StopIteration:
            step.finish()
            raise
        except BaseException:
            # What went wrong is to be seen, and not what comes of a step that was left in the middle.
            with suppress(Exception):
                step.finish()
            raise
        step.finish()
        if trainer.should_stop or trainer.received_sigterm:
            # Lightning knows what follows from these.
            self.on_advance_end(data_fetcher)

    def _lean_steps_ahead(self, data_fetcher: _DataFetcher) -> int:
        """How many batches lie before the next one that Lightning must see."""
        trainer = self.trainer
        done = self.batch_progress.current.ready
        # Lightning resets running values at the first batch, which may also be the first after a restart.
        if self.restarting or done == 0 or trainer._logger_connector._first_loop_iter is None:
            return 0
        if trainer.should_stop or trainer.fast_dev_run:
            return 0
        # Without backward, as where batch norms are only to see the data, a step is another one.
        if trainer.fit_loop._skip_backward:
            return 0
        # Which batch is the last must be known before it is there.
        if data_fetcher.length is None:
            return 0
        ahead = min(trainer.num_training_batches - done, data_fetcher.length - data_fetcher.fetched) - 1
        if self._should_check_val_epoch() and trainer.val_check_batch != float("inf"):
            every = trainer.val_check_batch
            passed = self.batch_progress.total.ready if trainer.check_val_every_n_epoch is None else done
            ahead = min(ahead, every - 1 - passed % every)
        if self.max_steps != -1:
            # Each step takes at least one batch.
            ahead = min(ahead, self.max_steps - 1 - self.global_step)
        return int(ahead)
