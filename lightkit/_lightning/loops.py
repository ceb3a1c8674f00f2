"""Private parts of Lightning's training loop, of its trainer and of its precision plug-ins."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop as FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization as AutomaticOptimization
from lightning.pytorch.loops.progress import _ProcessedTracker as ProcessedTracker
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import WarningCache

from lightkit._lightning.metrics import LoggerConnector, ResultCollection

__all__ = [
    "BATCHES_THAT_STEPPED",
    "CLIPPING_METHODS",
    "PRECISION_METHODS",
    "AutomaticOptimization",
    "DataFetcher",
    "FitLoop",
    "ProcessedTracker",
    "TrainingEpochLoop",
]

# The key in ``vars(epoch_loop)`` of the number of batches that ended with an optimizer step.
BATCHES_THAT_STEPPED = "_batches_that_stepped"

# The methods through which a precision plug-in takes part in a step.
PRECISION_METHODS = ("pre_backward", "backward", "post_backward", "optimizer_step", "_wrap_closure", "_after_closure")

# The methods of a precision plug-in that clip gradients.
CLIPPING_METHODS = ("_clip_gradients", "clip_gradients")


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.profilers import Profiler

    class ConnectedTrainer(pl.Trainer):
        """A trainer with the attributes that its connectors set, which the class does not declare."""

        callbacks: list[Callback]
        fast_dev_run: int | bool
        log_every_n_steps: int
        profiler: Profiler


def training_batches(trainer: pl.Trainer) -> Any:
    """Returns what a fit will iterate over, such as a DataLoader; asks the data module or the module for it."""
    return trainer.fit_loop._data_source.dataloader()


def connected(trainer: pl.Trainer) -> ConnectedTrainer:
    """Returns ``trainer`` itself, with a type that declares the attributes which its connectors set."""
    return cast("ConnectedTrainer", trainer)


def batch_counters(loop: TrainingEpochLoop) -> tuple[ProcessedTracker, ProcessedTracker]:
    """Returns Lightning's counters of the batches of the whole fit, and of those of the present epoch."""
    return cast(ProcessedTracker, loop.batch_progress.total), cast(ProcessedTracker, loop.batch_progress.current)


def results_of(loop: TrainingEpochLoop) -> ResultCollection:
    """Returns the running values of the metrics that the present training epoch has logged."""
    return loop._results


def logger_connector(trainer: pl.Trainer) -> LoggerConnector:
    """Returns the connector by which ``trainer`` collects metrics and passes them to its loggers."""
    return trainer._logger_connector


def batch_has_started(trainer: pl.Trainer) -> bool:
    """Returns True from the start of the first batch of the present epoch on."""
    return trainer._logger_connector._first_loop_iter is not None


def skips_backward(trainer: pl.Trainer) -> bool:
    """Returns True if the training steps of ``trainer.fit`` have no backward pass."""
    return trainer.fit_loop._skip_backward


def should_accumulate(trainer: pl.Trainer) -> Callable[[], bool]:
    """Returns the fit loop's method that returns True if the present batch only accumulates gradients."""
    return trainer.fit_loop._should_accumulate


def validates_in_epoch(loop: TrainingEpochLoop) -> bool:
    """Returns True if the present epoch has a validation."""
    return loop._should_check_val_epoch()


def validates_by_time(trainer: pl.Trainer) -> bool:
    """Returns True if ``val_check_interval`` of ``trainer`` is a time and not a number of batches."""
    return vars(trainer)["_val_check_time_interval"] is not None


def training_step_takes_iterator(trainer: pl.Trainer) -> bool:
    """Returns True if ``training_step`` has a parameter ``dataloader_iter``."""
    return isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)


def training_step_takes_index(loop: TrainingEpochLoop) -> bool:
    """Returns True if ``training_step`` has a parameter ``batch_idx``."""
    return "batch_idx" in loop._build_kwargs(OrderedDict(), None, 0)


def is_training_done(loop: TrainingEpochLoop) -> bool:
    """Returns True after the last training batch of the present epoch, or of the fit."""
    return loop._is_training_done


def sigterm_check(loop: TrainingEpochLoop) -> Callable[[], None]:
    """Returns the method of ``loop`` that raises an exception in all processes if process 0 has received SIGTERM."""
    return loop._broadcast_sigterm_tensor


def replace_sigterm_check(loop: TrainingEpochLoop, check: Callable[[], None]) -> None:
    """Sets the function ``check`` on ``loop`` in place of the method that `sigterm_check` returns."""
    loop._broadcast_sigterm_tensor = check


def original_signal_handlers(trainer: pl.Trainer) -> dict[int, Any]:
    """Returns the signal handlers that Lightning has replaced by its own, by the number of the signal."""
    return trainer._signal_connector._original_handlers


def set_received_sigterm(trainer: pl.Trainer) -> None:
    """Makes ``trainer.received_sigterm`` True."""
    trainer._signal_connector.received_sigterm = True


def warning_cache(loop: TrainingEpochLoop) -> WarningCache:
    """Returns the cache of warnings by which ``loop`` gives each warning once."""
    return loop._warning_cache


def loaders_of_training(trainer: pl.Trainer) -> tuple[list[Any], list[Any]]:
    """Returns the training data loaders, and their iterators; the second list is empty if there are none yet."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    iterator = combined._iterator
    return combined.flattened, iterator.iterators if iterator is not None else []


def owner_of_data_hook(trainer: pl.Trainer, hook: str) -> pl.LightningModule | pl.LightningDataModule:
    """Returns the module or the data module whose method Lightning calls for the data hook named ``hook``."""
    selector = trainer._data_connector._datahook_selector
    assert selector is not None
    return selector.get_instance(hook)


def clip_gradients_of(precision: Precision) -> Callable[..., None]:
    """Returns the method of ``precision`` that clips the gradients of an optimizer, by value or by norm."""
    return precision._clip_gradients


def averages_model(strategy: Strategy) -> bool:
    """Returns True if Lightning's DDP strategy averages the parameters periodically; False before it is set up."""
    return getattr(strategy, "_model_averager", None) is not None
