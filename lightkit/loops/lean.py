"""A replacement for ``run`` of Lightning's training loop that takes most steps by `LeanStep`."""

from __future__ import annotations

from contextlib import suppress

from lightkit._lightning.loops import (
    DataFetcher,
    TrainingEpochLoop,
    batch_has_started,
    connected,
    results_of,
    skips_backward,
    validates_in_epoch,
)
from lightkit._lightning.step import STEP_FUNCTIONS
from lightkit._util.stand_in import StandIn
from lightkit.loops.cuda_graphs import PassGraphs
from lightkit.loops.step import LeanStep
from lightkit.loops.step_logging import StepLogger, fast_log


class LeanRun:
    """Replaces ``run`` of Lightning's training loop: it runs the same epoch with less work between the steps.

    The constructor sets the object as ``loop.run``; `undo` restores the loop's own method and releases the graphs.

    Lightning's own code runs the first and the last batch of an epoch, the batch before a validation, the last step
    of a training and the first batches after a restart. It also runs all batches of a loader without a length, of a run
    with ``fast_dev_run`` and while a function of Lightning's step is replaced, and the steps without backward.
    `LeanStep` runs the other batches. It calls the hooks that a
    callback or the module overrides, in Lightning's order. The loop object and its class stay the same.

    Args:
        loop: the epoch loop of a trainer for which `lightkit.loops.unsupported_reason` returns None.
        graphs: the CUDA graphs of forward and backward; None for no graphs.

    Attributes:
        graphs: the argument ``graphs``.
    """

    def __init__(self, loop: TrainingEpochLoop, graphs: PassGraphs | None = None) -> None:
        self._loop = loop
        self.graphs = graphs
        self._stand_in = StandIn(loop, "run", self)

    def undo(self) -> None:
        """Restores the loop's own ``run`` and releases the graphs."""
        if self.graphs is not None:
            self.graphs.release()
        self._stand_in.undo()

    def __call__(self, data_fetcher: DataFetcher) -> None:
        """Runs one epoch on the batches of ``data_fetcher``."""
        loop = self._loop
        loop.reset()
        loop.on_run_start(data_fetcher)
        logger = StepLogger(loop.trainer)
        while not loop.done:
            try:
                count = self._count_lean_steps(data_fetcher)
                if count > 0:
                    self._run_lean_steps(LeanStep(loop.trainer, logger, self.graphs), count, data_fetcher)
                else:
                    loop.advance(data_fetcher)
                    loop.on_advance_end(data_fetcher)
            except StopIteration:
                break
            finally:
                loop.on_iteration_done()

    def _run_lean_steps(self, step: LeanStep, count: int, data_fetcher: DataFetcher) -> None:
        """Runs up to `count` lean steps; Lightning's progress counters tell the caller how many.

        It stops early if the training ends (``should_stop``, SIGTERM), or if `step` is outdated: see
        `LeanStep.is_current`. The caller then makes a new `LeanStep`.

        Raises:
            StopIteration: the data loader has no batch left.
        """
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
            # An error of the cleanup must not hide the error of the step.
            with suppress(Exception):
                step.finish_after_error()
            raise
        step.finish()
        if trainer.should_stop or trainer.received_sigterm:
            # Lightning's code handles both.
            loop.on_advance_end(data_fetcher)

    def _count_lean_steps(self, data_fetcher: DataFetcher) -> int:
        """Returns the number of batches before the next batch that Lightning must run; 0 or less for none."""
        loop, trainer = self._loop, connected(self._loop.trainer)
        done = loop.batch_progress.current.ready
        # Lightning resets running values at the first batch, which may also be the first after a restart.
        if loop.restarting or done == 0 or not batch_has_started(trainer):
            return 0
        if trainer.should_stop or trainer.fast_dev_run or not STEP_FUNCTIONS.are_in_place():
            return 0
        # A step without backward, by which batch norms are calibrated, differs from a lean step.
        if skips_backward(trainer):
            return 0
        # A loader without a length does not announce its last batch.
        if data_fetcher.length is None:
            return 0
        count = min(trainer.num_training_batches - done, data_fetcher.length - data_fetcher.fetched) - 1
        every = trainer.val_check_batch
        if validates_in_epoch(loop) and every is not None and every != float("inf"):
            passed = loop.batch_progress.total.ready if trainer.check_val_every_n_epoch is None else done
            count = min(count, every - 1 - passed % every)
        if loop.max_steps != -1:
            # Each step takes at least one batch.
            count = min(count, loop.max_steps - 1 - loop.global_step)
        return int(count)
