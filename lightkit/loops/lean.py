"""Lightning's training loop, with most of its steps taken by `LeanStep`."""

from __future__ import annotations

from contextlib import suppress

from lightkit._lightning.loops import (
    DataFetcher,
    TrainingEpochLoop,
    batch_has_started,
    results_of,
    skips_backward,
    validates_in_epoch,
)
from lightkit._lightning.step import STEP_FUNCTIONS
from lightkit._util.stand_in import StandIn
from lightkit.loops.graphs import PassGraphs
from lightkit.loops.log import StepLogger, fast_log
from lightkit.loops.step import LeanStep


class LeanRun:
    """Stands for ``run`` of Lightning's training loop, and runs an epoch the same, with less work between the steps.

    The first and the last batch of an epoch, the batch before a validation, the last step of a training and
    everything at a restart go through Lightning's own code. What lies between is taken by `LeanStep`, which calls
    the same hooks in the same order where somebody implements them. The loop stays Lightning's own object and class.

    Args:
        loop: of a fit for which there is no `obstacle`.
        graphs: take the passes of the steps between, where they can; None for none. Kept as an attribute.
    """

    def __init__(self, loop: TrainingEpochLoop, graphs: PassGraphs | None = None) -> None:
        self._loop = loop
        self.graphs = graphs
        self._stand_in = StandIn(loop, "run", self)

    def undo(self) -> None:
        """Makes the loop's ``run`` Lightning's again."""
        if self.graphs is not None:
            self.graphs.release()
        self._stand_in.undo()

    def __call__(self, data_fetcher: DataFetcher) -> None:
        """Runs one epoch."""
        loop = self._loop
        loop.reset()
        loop.on_run_start(data_fetcher)
        log = StepLogger(loop.trainer)
        while not loop.done:
            try:
                ahead = self._lean_steps_ahead(data_fetcher)
                if ahead > 0:
                    self._take(LeanStep(loop.trainer, log, self.graphs), ahead, data_fetcher)
                else:
                    loop.advance(data_fetcher)
                    loop.on_advance_end(data_fetcher)
            except StopIteration:
                break
            finally:
                loop.on_iteration_done()

    def _take(self, step: LeanStep, count: int, data_fetcher: DataFetcher) -> None:
        """Takes steps, until something is due that Lightning or another `LeanStep` must see."""
        loop, trainer = self._loop, self._loop.trainer
        try:
            with fast_log(trainer.lightning_module, results_of(loop)):
                step.begin()
                for _ in range(count):
                    step(data_fetcher)
                    if trainer.should_stop or trainer.received_sigterm:
                        break
                    step.advance_end()
                    if not step.is_current():
                        break
        except BaseException:
            # What went wrong is to be seen, and not what comes of a step that was left in the middle.
            with suppress(Exception):
                step.finish_after_error()
            raise
        step.finish()
        if trainer.should_stop or trainer.received_sigterm:
            # Lightning knows what follows from these.
            loop.on_advance_end(data_fetcher)

    def _lean_steps_ahead(self, data_fetcher: DataFetcher) -> int:
        """Returns how many batches lie before the next one that Lightning must see."""
        loop, trainer = self._loop, self._loop.trainer
        done = loop.batch_progress.current.ready
        # Lightning resets running values at the first batch, which may also be the first after a restart.
        if loop.restarting or done == 0 or not batch_has_started(trainer):
            return 0
        if trainer.should_stop or trainer.fast_dev_run or not STEP_FUNCTIONS.are_in_place():
            return 0
        # Without backward, as where batch norms are only to see the data, a step is another one.
        if skips_backward(trainer):
            return 0
        # Which batch is the last must be known before it is there.
        if data_fetcher.length is None:
            return 0
        ahead = min(trainer.num_training_batches - done, data_fetcher.length - data_fetcher.fetched) - 1
        if validates_in_epoch(loop) and trainer.val_check_batch != float("inf"):
            every = trainer.val_check_batch
            passed = loop.batch_progress.total.ready if trainer.check_val_every_n_epoch is None else done
            ahead = min(ahead, every - 1 - passed % every)
        if loop.max_steps != -1:
            # Each step takes at least one batch.
            ahead = min(ahead, loop.max_steps - 1 - loop.global_step)
        return int(ahead)
