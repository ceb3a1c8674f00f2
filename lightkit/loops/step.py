"""A training step that looks up hooks, settings and private attributes once instead of in every step."""

from __future__ import annotations

from collections.abc import Callable
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
    batch_counters,
    clip_gradients_of,
    connected,
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
from lightkit.loops.cuda_graphs import CapturedPasses, PassGraphs
from lightkit.loops.hooks import Hooks, is_overridden
from lightkit.loops.side_effects import SideEffectRecorder
from lightkit.loops.step_logging import StepLogger, StepMetrics

ZERO_GRAD = Originals((torch,), torch.optim.Optimizer, "zero_grad", "profile_hook_step")


class LeanStep:
    """Runs one batch from the data loader to the updated weights, and updates Lightning's progress and metrics.

    A call does the same in the same order as ``_TrainingEpochLoop.advance`` of Lightning 2.6 with automatic
    optimization. The batch must be neither the first nor the last of an epoch.

    Use: `begin`; for each batch, a call and `advance_end`; `finish`, or after an error `finish_after_error`. When
    `is_current` returns False, make a new object.

    Args:
        trainer: a trainer in a fit for which `lightkit.loops.unsupported_reason` returns None.
        logger: the object that hands the metrics of a step to the loggers.
        graphs: the CUDA graphs of forward and backward, or None.
    """

    def __init__(self, trainer: pl.Trainer, logger: StepLogger, graphs: PassGraphs | None = None) -> None:
        self._trainer = connected(trainer)
        self._logger = logger
        self._module = module = trainer.lightning_module
        # A write past nn.Module's __setattr__ does not look whether the value is a parameter.
        self._attributes = vars(module)
        self._loop = loop = trainer.fit_loop.epoch_loop
        self._loop_attributes = vars(loop)
        self._connector = logger_connector(trainer)
        self._connector_attributes = vars(self._connector)
        self._results = results_of(loop)
        self._precision = trainer.precision_plugin
        self._optimizer = trainer.optimizers[0]
        self._zeroes_inline = ZERO_GRAD.are_in_place() and not is_overridden(
            "zero_grad", self._optimizer, torch.optim.Optimizer
        )
        # `is_current` compares the number of their attributes: a new attribute may override a method.
        self._callbacks = list(self._trainer.callbacks)
        self._participants = [
            *(module, self._optimizer, loop, loop.automatic_optimization, trainer.strategy),
            *self._callbacks,
        ]
        self._attribute_counts: list[int] = []
        self._step_metrics = StepMetrics(self._results)
        self._progress = loop.batch_progress
        self._counters = batch_counters(loop)
        self._step_progress = loop.automatic_optimization.optim_progress.optimizer.step
        self._zero_grad_progress = loop.automatic_optimization.optim_progress.optimizer.zero_grad
        self._takes_index = training_step_takes_index(loop)
        self._overrides_clipping = any(
            is_overridden(name, module, pl.LightningModule)
            for name in ("configure_gradient_clipping", "clip_gradients")
        ) or any(is_overridden(name, self._precision, Precision) for name in CLIPPING_METHODS)
        self._clip_gradients = clip_gradients_of(self._precision)
        self._has_step_schedulers = any(c.interval == "step" for c in trainer.lr_scheduler_configs)
        self._on_batch_start = Hooks(trainer, "on_train_batch_start")
        self._on_before_zero_grad = Hooks(trainer, "on_before_zero_grad")
        self._on_before_backward = Hooks(trainer, "on_before_backward")
        self._on_after_backward = Hooks(trainer, "on_after_backward")
        self._on_before_step = Hooks(trainer, "on_before_optimizer_step")
        self._on_batch_end = Hooks(trainer, "on_train_batch_end")
        self._transfer = _Transfer(trainer)
        strategy = trainer.strategy
        self._is_single_process = trainer.world_size == 1
        self._is_wrapped = strategy.model is not module
        # The strategy's step calls forward of the wrapper.
        self._owner_of_step: Strategy | pl.LightningModule = strategy if self._is_wrapped else module
        starts = is_overridden("on_train_batch_start", strategy, Strategy)
        self._strategy_on_batch_start = strategy.on_train_batch_start if starts else None
        self._after_step = strategy.after_step if isinstance(strategy, StepObserver) else None
        self._no_sync: Callable[[], AbstractContextManager[Any]] = (
            strategy.block_backward_sync if isinstance(strategy, ParallelStrategy) else nullcontext
        )
        # Lightning broadcasts whether process 0 received SIGTERM; lightkit's strategies replace this check.
        has_peers = not self._is_single_process and dist.is_available() and dist.is_initialized()
        self._check_sigterm = sigterm_check(loop) if has_peers else None
        self._graphs = graphs
        if graphs is not None and graphs.unsupported_reason is None:
            self._check_for_graphs(graphs)
            graphs.start()
        # The state of the present batch.
        self._batch: Any = None
        self._batch_idx = 0
        self._outputs: dict[str, Any] | None = {}

    def __call__(self, data_fetcher: DataFetcher) -> None:
        """Fetches a batch from ``data_fetcher`` and trains on it.

        Raises:
            StopIteration: there is no batch left.
        """
        if self._check_sigterm is not None:
            self._check_sigterm()
        batch, _, _ = next(data_fetcher)
        total, current = self._counters
        self._batch_idx = current.ready
        self._progress.is_last_batch = data_fetcher.done
        self._batch = batch = self._transfer(batch)
        total.ready += 1
        current.ready += 1
        # The connector's on_batch_start does this for a batch that is not the first, after a search for the results.
        self._connector_attributes[FIRST_ITERATION] = False
        self._results.batch, self._results.batch_size, self._results.dataloader_idx = batch, None, None
        if batch is None:
            warning_cache(self._loop).warn(
                "train_dataloader yielded None. If this was on purpose, ignore this warning..."
            )
            self._outputs = None
        else:
            if self._on_batch_start:
                self._on_batch_start(batch, self._batch_idx)
            if self._strategy_on_batch_start is not None:
                self._strategy_on_batch_start(batch, self._batch_idx)
            total.started += 1
            current.started += 1
            self._optimize()
        total.processed += 1
        current.processed += 1
        if self._has_step_schedulers:
            self._loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._on_batch_end:
            self._on_batch_end(self._outputs, batch, self._batch_idx)
        # Lightning's connector computes every metric here. A lean step leaves that to those who read one.
        self._results.batch = self._results.batch_size = None
        self._step_metrics.record()
        self._batch = self._outputs = None
        total.completed += 1
        current.completed += 1
        self._logger()

    def advance_end(self) -> None:
        """Updates schedulers and counters after a batch, as Lightning's ``on_advance_end`` without a validation."""
        if self._has_step_schedulers:
            self._loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        if not self._accumulates():
            self._loop_attributes[BATCHES_THAT_STEPPED] += 1

    def begin(self) -> None:
        """Prepares the first step.

        Call it after `fast_log`, which adds attributes to the module: `is_current` compares their number with that at
        this call.
        """
        self._attribute_counts = self._count_attributes()
        self._step_metrics.record()

    def is_current(self) -> bool:
        """Returns False if something that the constructor looked up may have changed since the call of `begin`.

        That is the case if a function of Lightning was patched, if the optimizer or a callback was replaced, or if an
        object that takes part in the step (module, optimizer, loop, strategy, callback) has got or lost an attribute,
        which may override a method.
        """
        trainer = self._trainer
        return (
            STEP_FUNCTIONS.are_in_place()
            and trainer.callbacks == self._callbacks
            and trainer.optimizers[0] is self._optimizer
            and self._count_attributes() == self._attribute_counts
            and (not self._zeroes_inline or ZERO_GRAD.are_in_place())
        )

    def _count_attributes(self) -> list[int]:
        return [len(vars(participant)) for participant in self._participants]

    def finish(self) -> None:
        """Ends a series of steps: brings Lightning's metrics up to date, and makes the loggers write unwritten metrics.

        The loop calls this once after the last step of a series; after an error it calls `finish_after_error`.
        """
        self._connector.on_batch_end()
        self._logger.save()

    def finish_after_error(self) -> None:
        """Restores the metrics of the last complete step, as after a failed step of Lightning; writes the log files."""
        self._step_metrics.restore(self._connector)
        self._logger.save()

    def _check_for_graphs(self, graphs: PassGraphs) -> None:
        parameters = set(self._module.parameters())
        if self._on_before_zero_grad:
            graphs.disable("on_before_zero_grad is overridden, which comes between the passes")
        elif not all(p in parameters for group in self._optimizer.param_groups for p in group["params"]):
            graphs.disable("the optimizer has parameters that are not the module's")

    def _accumulates(self) -> bool:
        return self._progress.current.ready % self._trainer.accumulate_grad_batches != 0

    def _optimize(self) -> None:
        if self._accumulates():
            with self._no_sync():
                self._forward_backward()
            return
        self._step_progress.increment_ready()
        # As in Lightning, the optimizer calls the closure; some optimizers call it more than once.
        before = self._set_hook("optimizer_step")
        self._optimizer.step(closure=self._closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._attributes[CURRENT_HOOK] = before
        if self._after_step is not None:
            self._after_step(self._optimizer)
        self._step_progress.increment_completed()

    def _closure(self) -> Tensor | None:
        loss = self._forward_backward()
        if self._on_before_step:
            self._on_before_step(self._optimizer)
        trainer = self._trainer
        if self._overrides_clipping or trainer.gradient_clip_val is not None:
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
        if graphs is None or graphs.unsupported_reason is not None or self._trainer.accumulate_grad_batches != 1:
            return self._run_passes(None)
        if (captured := graphs.get(self._batch, self._forward)) is not None:
            return self._replay(captured)
        with graphs.recording(self._batch, self._batch_idx) as recorder:
            return self._run_passes(recorder)

    def _run_passes(self, recorder: SideEffectRecorder | None) -> Tensor | None:
        context = nullcontext() if recorder is None else recorder
        with context:
            index = self._batch_idx if recorder is None else recorder.index
            loss, self._outputs = self._forward(self._batch, index)
        if recorder is not None:
            recorder.check_outputs(self._outputs)
        if loss is None:
            Closure.warning_cache.warn(
                "`training_step` returned `None`. If this was on purpose, ignore this warning..."
            )
        if self._batch_idx % self._trainer.accumulate_grad_batches == 0:
            self._zero_grad()
        if loss is not None:
            if self._on_before_backward:
                self._on_before_backward(loss)
            before = self._set_hook("backward")
            with context:
                loss.backward()
            self._attributes[CURRENT_HOOK] = before
            if self._on_after_backward:
                self._on_after_backward()
        return self._outputs.get("loss")

    def _replay(self, captured: CapturedPasses) -> Tensor:
        """Replays both passes from a graph, then logs and calls the hooks before and after backward.

        Returns:
            The loss.
        """
        self._zero_grad()
        self._outputs = outputs = captured(self._batch)
        before = self._set_hook("training_step")
        for name, value, arguments, options in captured.log_calls:
            self._module.log(name, value, *arguments, **options)
        self._attributes[CURRENT_HOOK] = before
        if self._on_before_backward:
            self._on_before_backward(outputs["loss"])
        if self._on_after_backward:
            self._on_after_backward()
        return outputs["loss"]

    def _forward(self, batch: Any, batch_idx: int) -> tuple[Tensor | None, dict[str, Any]]:
        """Runs ``training_step``.

        Returns:
            The loss for backward, divided by ``accumulate_grad_batches``, or None; and the outputs of ``training_step``
            by name.
        """
        accumulate = self._trainer.accumulate_grad_batches
        before = self._set_hook("training_step")
        with self._forward_context():
            training_step = self._owner_of_step.training_step
            output = training_step(batch, batch_idx) if self._takes_index else training_step(batch)
        self._attributes[CURRENT_HOOK] = before
        if output is None and not self._is_single_process:
            raise RuntimeError("training_step returned None: with several processes no batch can be left out")
        if type(output) is Tensor and accumulate == 1:
            return output, {"loss": output.detach().clone()}
        result = ClosureResult.from_training_step_output(output, accumulate)
        return result.closure_loss, {} if result.loss is None else result.asdict()

    def _set_hook(self, hook: str) -> str | None:
        """Sets the hook under which the module logs, and returns the previous hook."""
        before = self._attributes[CURRENT_HOOK]
        self._attributes[CURRENT_HOOK] = hook
        return before

    def _forward_context(self) -> AbstractContextManager[Any]:
        # The context of the base class does nothing in two layers. The step of a strategy enters its own.
        is_empty = self._is_wrapped or type(self._precision) is Precision
        return nullcontext() if is_empty else self._precision.train_step_context()

    def _zero_grad(self) -> None:
        progress = self._zero_grad_progress
        progress.increment_ready()
        if self._on_before_zero_grad:
            self._on_before_zero_grad(self._optimizer)
        progress.increment_started()
        if self._zeroes_inline and not torch.autograd._profiler_enabled():
            # Optimizer.zero_grad does this, and opens a range of the profiler.
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            self._optimizer.zero_grad()
        progress.increment_completed()


class _Transfer:
    """Moves a batch to the device; calls only those transfer hooks that the module or the data module overrides."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self._module = trainer.lightning_module
        self._attributes = vars(self._module)
        self._convert = None
        if type(trainer.precision_plugin).convert_input is not Precision.convert_input:
            self._convert = trainer.precision_plugin.convert_input
        self._before_transfer = batch_transfer_of(self._module)
        self._after_transfer = _overridden_data_hook(trainer, "on_after_batch_transfer")
        moving = ("on_before_batch_transfer", "transfer_batch_to_device")
        overrides_moving = any(_overridden_data_hook(trainer, hook) is not None for hook in moving)
        self._device = trainer.strategy.root_device
        self._may_stay = self._device.type in ("cpu", "cuda") and not overrides_moving

    def __call__(self, batch: Any) -> Any:
        if self._convert is not None:
            batch = self._convert(batch)
        if not (self._may_stay and _is_on(self._device, batch)):
            batch = self._before_transfer(batch, dataloader_idx=0)
            return self._strategy.batch_to_device(batch, dataloader_idx=0)
        if self._after_transfer is not None:
            before, self._attributes[CURRENT_HOOK] = self._attributes[CURRENT_HOOK], "on_after_batch_transfer"
            batch = self._after_transfer(batch, 0)
            self._attributes[CURRENT_HOOK] = before
        return batch


def _overridden_data_hook(trainer: pl.Trainer, hook: str) -> Callable[..., Any] | None:
    """Returns the method by which the module or the data module overrides a data hook; None if neither does."""
    owner = owner_of_data_hook(trainer, hook)
    parent = pl.LightningModule if isinstance(owner, pl.LightningModule) else pl.LightningDataModule
    return getattr(owner, hook) if is_overridden(hook, owner, parent) else None


def _is_on(device: torch.device, batch: Any) -> bool:
    """Returns True if a batch is a tensor on ``device``, or a tuple or list of such tensors."""
    if type(batch) is Tensor:
        return batch.device == device
    return type(batch) in (tuple, list) and all(type(t) is Tensor and t.device == device for t in batch)
