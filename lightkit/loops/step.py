"""One training step as Lightning takes it, with all that is the same in every step looked up beforehand."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor

from lightkit._lightning.loops import (
    BATCHES_THAT_STEPPED,
    CLIPPING_METHODS,
    DataFetcher,
    clip_gradients_of,
    logger_connector,
    owner_of_data_hook,
    results_of,
    sigterm_check,
    training_step_takes_index,
    warning_cache,
)
from lightkit._lightning.metrics import FIRST_ITERATION
from lightkit._lightning.module import CURRENT_HOOK, batch_transfer_of
from lightkit._lightning.step import STEP_FUNCTIONS
from lightkit._util.originals import Originals
from lightkit._util.strategy_traits import StepObserver
from lightkit.loops.graphs import CapturedPasses, PassGraphs
from lightkit.loops.hooks import Hooks, is_implemented
from lightkit.loops.log import ShownMetrics, StepLogger
from lightkit.loops.watch import Watch

ZERO_GRAD = Originals((torch,), torch.optim.Optimizer, "zero_grad", "profile_hook_step")


class LeanStep:
    """Takes a batch from the data to the updated weights, and keeps Lightning's books.

    It does what ``_TrainingEpochLoop.advance`` of Lightning 2.6 does for automatic optimization with the strategies
    that `obstacle` knows, in the same order, for a batch that is neither the first nor the last of an epoch.

    Args:
        trainer: in the middle of a fit for which there is no `obstacle`.
        log: hands what was logged to the loggers.
        graphs: take the passes where they can, or None.
    """

    def __init__(self, trainer: pl.Trainer, log: StepLogger, graphs: PassGraphs | None = None) -> None:
        self._trainer = trainer
        self._log = log
        self._module = module = trainer.lightning_module
        self._attributes = vars(module)
        self._loop = loop = trainer.fit_loop.epoch_loop
        self._loop_attributes = vars(loop)
        self._connector = logger_connector(trainer)
        self._connector_attributes = vars(self._connector)
        self._results = results_of(loop)
        self._precision = trainer.precision_plugin
        self._optimizer = trainer.optimizers[0]
        self._zeroes_plainly = ZERO_GRAD.are_in_place() and not is_implemented(
            "zero_grad", self._optimizer, torch.optim.Optimizer
        )
        # What is looked up here once is looked up anew when one of these has changed.
        self._callbacks = list(trainer.callbacks)
        self._parts = [module, self._optimizer, loop, loop.automatic_optimization, trainer.strategy, *self._callbacks]
        self._sizes: list[int] = []
        self._shown = ShownMetrics(self._results)
        self._progress = loop.batch_progress
        self._step_progress = loop.automatic_optimization.optim_progress.optimizer.step
        self._zero_grad_progress = loop.automatic_optimization.optim_progress.optimizer.zero_grad
        self._takes_index = training_step_takes_index(loop)
        self._clips = any(
            is_implemented(name, module, pl.LightningModule)
            for name in ("configure_gradient_clipping", "clip_gradients")
        ) or any(is_implemented(name, self._precision, Precision) for name in CLIPPING_METHODS)
        self._clip_gradients = clip_gradients_of(self._precision)
        self._steps_schedulers = any(c.interval == "step" for c in trainer.lr_scheduler_configs)
        self._batch_start = Hooks(trainer, "on_train_batch_start")
        self._before_zero_grad = Hooks(trainer, "on_before_zero_grad")
        self._before_backward = Hooks(trainer, "on_before_backward")
        self._after_backward = Hooks(trainer, "on_after_backward")
        self._before_step = Hooks(trainer, "on_before_optimizer_step")
        self._batch_end = Hooks(trainer, "on_train_batch_end")
        self._transfer = _Transfer(trainer)
        # What is the strategy's.
        strategy = trainer.strategy
        self._is_alone = trainer.world_size == 1
        self._is_wrapped = strategy.model is not module
        # Where the model is wrapped, by its forward.
        self._takes_step = strategy if self._is_wrapped else module
        starts = is_implemented("on_train_batch_start", strategy, Strategy)
        self._strategy_start = strategy.on_train_batch_start if starts else None
        self._after_step = strategy.after_step if isinstance(strategy, StepObserver) else None
        self._unsynchronized = strategy.block_backward_sync if isinstance(strategy, ParallelStrategy) else nullcontext
        # Lightning asks whether process 0 was sent one, the strategies here look for themselves.
        met = not self._is_alone and dist.is_available() and dist.is_initialized()
        self._stop_if_told = sigterm_check(loop) if met else None
        self._graphs = graphs
        if graphs is not None and graphs.obstacle is None:
            self._check_for_graphs(graphs)
            graphs.start()
        # Of the batch at hand.
        self._batch: Any = None
        self._batch_idx = 0
        self._outputs: dict[str, Any] = {}

    def __call__(self, data_fetcher: DataFetcher) -> None:
        """Fetches a batch and trains on it.

        Raises:
            StopIteration: there is none.
        """
        if self._stop_if_told is not None:
            self._stop_if_told()
        batch, _, _ = next(data_fetcher)
        total, current = self._progress.total, self._progress.current
        self._batch_idx = current.ready
        self._progress.is_last_batch = data_fetcher.done
        self._batch = batch = self._transfer(batch)
        total.ready += 1
        current.ready += 1
        # What the connector does at the start of a batch that is not the first; it would look for these results.
        self._connector_attributes[FIRST_ITERATION] = False
        self._results.batch, self._results.batch_size, self._results.dataloader_idx = batch, None, None
        if batch is None:
            warning_cache(self._loop).warn(
                "train_dataloader yielded None. If this was on purpose, ignore this warning..."
            )
            self._outputs = None
        else:
            if self._batch_start:
                self._batch_start(batch, self._batch_idx)
            if self._strategy_start is not None:
                self._strategy_start(batch, self._batch_idx)
            total.started += 1
            current.started += 1
            self._optimize()
        total.processed += 1
        current.processed += 1
        if self._steps_schedulers:
            self._loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._batch_end:
            self._batch_end(self._outputs, batch, self._batch_idx)
        # Lightning's connector computes every metric here; those who want one ask for it.
        self._results.batch = self._results.batch_size = None
        self._shown.note()
        self._batch = self._outputs = None
        total.completed += 1
        current.completed += 1
        self._log()

    def advance_end(self) -> None:
        """What follows a batch that is not followed by a validation."""
        if self._steps_schedulers:
            self._loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        if not self._accumulates():
            self._loop_attributes[BATCHES_THAT_STEPPED] += 1

    def begin(self) -> None:
        """Prepares for the first step, when the module logs by `FastLog` already."""
        self._sizes = self._sizes_of_parts()
        self._shown.note()

    def is_current(self) -> bool:
        """Returns False if what was looked up beforehand may have changed since `begin`.

        That is where Lightning's own functions were patched, the optimizer or a callback is another one, or somebody
        has put an attribute on one of those that take part, which may be a method.
        """
        trainer = self._trainer
        return (
            STEP_FUNCTIONS.are_in_place()
            and trainer.callbacks == self._callbacks
            and trainer.optimizers[0] is self._optimizer
            and self._sizes_of_parts() == self._sizes
            and (not self._zeroes_plainly or ZERO_GRAD.are_in_place())
        )

    def _sizes_of_parts(self) -> list[int]:
        return [len(vars(part)) for part in self._parts]

    def finish(self) -> None:
        """Leaves what Lightning's own step leaves, where that or nothing follows."""
        self._connector.on_batch_end()
        self._log.save()

    def finish_after_error(self) -> None:
        """Leaves what Lightning's own step leaves when it fails: the metrics of the step before."""
        self._shown.collect(self._connector)
        self._log.save()

    def _check_for_graphs(self, graphs: PassGraphs) -> None:
        mine = set(self._module.parameters())
        if self._before_zero_grad:
            graphs.give_up("somebody implements on_before_zero_grad, which comes between the passes")
        elif not all(p in mine for group in self._optimizer.param_groups for p in group["params"]):
            graphs.give_up("the optimizer has parameters that are not the module's")

    def _accumulates(self) -> bool:
        return self._progress.current.ready % self._trainer.accumulate_grad_batches != 0

    def _optimize(self) -> None:
        if self._accumulates():
            with self._unsynchronized():
                self._forward_backward()
            return
        self._step_progress.increment_ready()
        # The optimizer calls it, as with Lightning: some do so more than once.
        before = self._enter("optimizer_step")
        self._optimizer.step(closure=self._closure)
        self._attributes[CURRENT_HOOK] = before
        if self._after_step is not None:
            self._after_step(self._optimizer)
        self._step_progress.increment_completed()

    def _closure(self) -> Tensor | None:
        loss = self._forward_backward()
        if self._before_step:
            self._before_step(self._optimizer)
        trainer = self._trainer
        if self._clips or trainer.gradient_clip_val is not None:
            self._clip_gradients(
                self._module,
                self._optimizer,
                trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
        return loss

    @torch.enable_grad()
    def _forward_backward(self) -> Tensor | None:
        graphs = self._graphs
        if graphs is None or graphs.obstacle is not None or self._trainer.accumulate_grad_batches != 1:
            return self._passes(None)
        if (captured := graphs.get(self._batch, self._forward)) is not None:
            return self._replay(captured)
        with graphs.watching(self._batch, self._batch_idx) as watch:
            return self._passes(watch)

    def _passes(self, watch: Watch | None) -> Tensor | None:
        context = nullcontext() if watch is None else watch
        with context:
            index = self._batch_idx if watch is None else watch.index
            loss, self._outputs = self._forward(self._batch, index)
        if watch is not None:
            watch.look_at_outputs(self._outputs)
        if loss is None:
            Closure.warning_cache.warn(
                "`training_step` returned `None`. If this was on purpose, ignore this warning..."
            )
        if self._batch_idx % self._trainer.accumulate_grad_batches == 0:
            self._zero_grad()
        if loss is not None:
            if self._before_backward:
                self._before_backward(loss)
            before = self._enter("backward")
            with context:
                loss.backward()
            self._attributes[CURRENT_HOOK] = before
            if self._after_backward:
                self._after_backward()
        return self._outputs.get("loss")

    def _replay(self, captured: CapturedPasses) -> Tensor:
        """Both passes at once; the hook before backward comes after them."""
        self._zero_grad()
        self._outputs = outputs = captured(self._batch)
        before = self._enter("training_step")
        for name, value, arguments, options in captured.log_calls:
            self._module.log(name, value, *arguments, **options)
        self._attributes[CURRENT_HOOK] = before
        if self._before_backward:
            self._before_backward(outputs["loss"])
        if self._after_backward:
            self._after_backward()
        return outputs["loss"]

    def _forward(self, batch: Any, batch_idx: int) -> tuple[Tensor | None, dict[str, Any]]:
        """The loss that backward starts from, and what training_step returned, as Lightning keeps it."""
        accumulate = self._trainer.accumulate_grad_batches
        before = self._enter("training_step")
        with self._forward_context():
            training_step = self._takes_step.training_step
            output = training_step(batch, batch_idx) if self._takes_index else training_step(batch)
        self._attributes[CURRENT_HOOK] = before
        if output is None and not self._is_alone:
            raise RuntimeError("training_step returned None: with several processes no batch can be left out")
        if type(output) is Tensor and accumulate == 1:
            return output, {"loss": output.detach().clone()}
        result = ClosureResult.from_training_step_output(output, accumulate)
        return result.closure_loss, {} if result.loss is None else result.asdict()

    def _enter(self, hook: str) -> str | None:
        """Has what is logged from now on logged by a hook; returns which one it was before."""
        before = self._attributes[CURRENT_HOOK]
        self._attributes[CURRENT_HOOK] = hook
        return before

    def _forward_context(self) -> AbstractContextManager:
        # The base class's is one that does nothing, in two layers. A strategy's step has its own.
        plain = self._is_wrapped or type(self._precision) is Precision
        return nullcontext() if plain else self._precision.train_step_context()

    def _zero_grad(self) -> None:
        progress = self._zero_grad_progress
        progress.increment_ready()
        if self._before_zero_grad:
            self._before_zero_grad(self._optimizer)
        progress.increment_started()
        if self._zeroes_plainly and not torch.autograd._profiler_enabled():
            # What Optimizer.zero_grad does, which also tells the profiler.
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            self._optimizer.zero_grad()
        progress.increment_completed()


class _Transfer:
    """Brings a batch to the device, through the hooks of data module and module that are implemented."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self._module = trainer.lightning_module
        self._convert = None
        if type(trainer.precision_plugin).convert_input is not Precision.convert_input:
            self._convert = trainer.precision_plugin.convert_input
        self._attributes = vars(self._module)
        self._transfer = batch_transfer_of(self._module)
        self._after = _implemented(trainer, "on_after_batch_transfer")
        moving = ("on_before_batch_transfer", "transfer_batch_to_device")
        is_moved = any(_implemented(trainer, hook) is not None for hook in moving)
        self._device = trainer.strategy.root_device
        self._may_stay = self._device.type in ("cpu", "cuda") and not is_moved

    def __call__(self, batch: Any) -> Any:
        if self._convert is not None:
            batch = self._convert(batch)
        if not (self._may_stay and _is_on(self._device, batch)):
            batch = self._transfer(batch, dataloader_idx=0)
            return self._strategy.batch_to_device(batch, dataloader_idx=0)
        if self._after is not None:
            before, self._attributes[CURRENT_HOOK] = self._attributes[CURRENT_HOOK], "on_after_batch_transfer"
            batch = self._after(batch, 0)
            self._attributes[CURRENT_HOOK] = before
        return batch


def _implemented(trainer: pl.Trainer, hook: str) -> Any:
    instance = owner_of_data_hook(trainer, hook)
    parent = pl.LightningModule if isinstance(instance, pl.LightningModule) else pl.LightningDataModule
    return getattr(instance, hook) if is_implemented(hook, instance, parent) else None


def _is_on(device: torch.device, batch: Any) -> bool:
    """Whether a batch is a flat sequence of tensors that need not be moved."""
    if type(batch) is Tensor:
        return batch.device == device
    return type(batch) in (tuple, list) and all(type(t) is Tensor and t.device == device for t in batch)
