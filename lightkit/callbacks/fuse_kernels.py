"""Brings the kernels to a LightningModule that knows nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.loss import _Loss

from lightkit import native
from lightkit._lightning.module import is_compiled as is_lightning_compiled
from lightkit._util.imported import is_instance
from lightkit.nn import CrossEntropyLoss, can_fuse
from lightkit.nn.fused_sequential import FusedCall, is_fused
from lightkit.ops import patch, patch_cross_entropy
from lightkit.optim.convert import REPLACEMENTS, convert
from lightkit.optim.convert import obstacle as optimizer_obstacle

_FUNCTION = "torch.nn.functional.cross_entropy"
_REPLACEMENT = "lightkit.ops.cross_entropy"
_FUSED = "it is on lightkit's kernels already"
_COMPILED = "it is under torch.compile, whose graphs stay torch's"


@dataclass(frozen=True)
class Found:
    """An optimizer or a loss that a run has, and what became of it.

    Args:
        name: where it is, such as ``optimizers[0]`` or the name of a submodule.
        kind: what it is in the user's code, such as ``torch.optim.SGD``.
        replacement: what does its work, or None if it was kept.
        reason: why it was kept.
    """

    name: str
    kind: str
    replacement: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        outcome = f"kept: {self.reason}" if self.replacement is None else f"replaced by {self.replacement}"
        return f"{self.name}: {outcome}" if self.name == self.kind else f"{self.name} ({self.kind}): {outcome}"


class FuseKernels(Callback):
    """Runs optimizers, cross-entropy and convolution blocks of torch on lightkit's kernels, while the trainer runs.

    Goes with any LightningModule, unchanged: ``Trainer(callbacks=[FuseKernels()])``. On the kernels run

    - optimizers that are a ``torch.optim.SGD``, ``Adam`` or ``AdamW``: see `lightkit.optim.convert`. For a
      fit;
    - ``torch.nn.functional.cross_entropy``, however it is called, in the thread of the trainer, and with it
      ``torch.nn.CrossEntropyLoss``: see `lightkit.ops.patch_cross_entropy`. For fit, validate, test and
      predict. Calls that the kernels do not cover, and code under torch.compile, stay torch's;
    - on a CPU, each ``torch.nn.Sequential`` with layers that go together as one operation, such as convolutions that
      a ReLU follows, as `lightkit.nn.FusedSequential` does. For fit, validate, test and predict.

    The objects keep their classes: ``type(optimizer)``, ``type(net)``, ``match``, the summary of the model and a
    profiler show the user's, copies and pickles are torch's, and so is what torch.jit, torch.fx, torch.compile and
    torch.export see of a ``Sequential``. Where somebody patches a method of torch's classes, or a function that they
    call, before a run or during it, that is called. A program that looks closely sees these differences:

    ================================== =====================================================================
    where                              what, during a run
    ================================== =====================================================================
    ``vars(optimizer)``                ``step`` and ``__getstate__`` are attributes of the object
    hooks of ``load_state_dict``       the optimizer has one of each kind more
    ``vars(net)`` of a fused net       ``_compiled_call_impl`` is an attribute of the object
    ``net.forward`` called by itself   runs torch's layers; the call of a net that has hooks does so, too
    ``F.cross_entropy.__code__``       is another; torch.jit.script cannot compile the function
    ``grad_fn`` of a result            is a node of lightkit's
    state of half-precision ``Adam``   the moments are float32
    ================================== =====================================================================

    When the run ends, or an exception or Ctrl-C ends it, everything is torch's again. Checkpoints hold nothing of
    lightkit: one made with this callback continues without it, and the other way round. A trainer can be copied and
    pickled during a run; the copy has nothing of it.

    What was found, and what became of it, is logged once a run and kept in ``report``. With strategies that
    spawn processes it stays in those. Without native kernels for the trainer's device nothing is replaced, and
    one warning says why.
    """

    def __init__(self) -> None:
        self._report: list[Found] = []
        # By trainer: one callback may serve several, also one within the other.
        self._undo: dict[int, ExitStack] = {}

    @property
    def report(self) -> tuple[Found, ...]:
        """What the last run had, and what became of it; ``str()`` of an entry is its line in the log."""
        return tuple(self._report)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replaces the function, before the module is set up."""
        self._restore(trainer)
        if _obstacle(trainer) is None and patch.unsupported_reason() is None:
            self._undo_of(trainer).enter_context(patch_cross_entropy())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Converts the optimizers, before their state is restored from a checkpoint."""
        self._replace_and_tell(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells what a validation on its own has."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._replace_and_tell(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells what a test has."""
        self._replace_and_tell(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells what a prediction has."""
        self._replace_and_tell(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes everything torch's again."""
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise, where the run does not come to its end."""
        self._restore(trainer)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, such as that of a trainer in the middle of a run, has replaced nothing and has nothing to undo.
        return {**vars(self), "_undo": {}}

    def _undo_of(self, trainer: pl.Trainer) -> ExitStack:
        return self._undo.setdefault(id(trainer), ExitStack())

    def _restore(self, trainer: pl.Trainer) -> None:
        self._undo.pop(id(trainer), ExitStack()).close()

    def _replace_and_tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cause = _obstacle(trainer)
        self._report = []
        if trainer.state.fn == TrainerFn.FITTING:
            self._report += [self._optimizer(trainer, i, cause) for i in range(len(trainer.optimizers))]
        compiled = _Compiled(pl_module)
        self._report += self._sequentials(trainer, pl_module, cause, compiled)
        function_cause = cause or patch.unsupported_reason()
        self._report += _losses(pl_module, function_cause, compiled)
        self._report.append(Found(_FUNCTION, _FUNCTION, None if function_cause else _REPLACEMENT, function_cause))
        if cause is not None:
            rank_zero_warn(f"FuseKernels replaces nothing: {cause}")
        else:
            rank_zero_info("\n  ".join(["FuseKernels:", *map(str, self._report)]))

    def _optimizer(self, trainer: pl.Trainer, index: int, cause: str | None) -> Found:
        optimizer = trainer.optimizers[index]
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        name, cls = f"optimizers[{index}]", type(optimizer)
        cause = cause or optimizer_obstacle(optimizer)
        if cause is not None:
            return Found(name, _name(cls), reason=cause)
        self._undo_of(trainer).callback(convert(optimizer))
        return Found(name, _name(cls), replacement=_name(REPLACEMENTS[cls]))

    def _sequentials(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, cause: str | None, compiled: _Compiled
    ) -> Iterator[Found]:
        """Every Sequential that could be fused."""
        device = trainer.strategy.root_device.type
        if device != "cpu":
            cause = f"convolutions are torch's on {device}"
        for name, module in pl_module.named_modules():
            if type(module) is nn.Sequential and can_fuse(module):
                reason = cause or (_COMPILED if compiled.above(name) else _FUSED if is_fused(module) else None)
                if reason is None:
                    self._undo_of(trainer).callback(FusedCall(module).undo)
                yield Found(name, "torch.nn.Sequential", None if reason else "lightkit.nn.FusedSequential", reason)


def _obstacle(trainer: pl.Trainer) -> str | None:
    cause = native.missing(trainer.strategy.root_device.type)
    return None if cause is None else f"there are no native kernels: {cause}"


def _losses(pl_module: pl.LightningModule, cause: str | None, compiled: _Compiled) -> Iterator[Found]:
    """Every loss module, and every module under torch.compile."""
    for name, module in pl_module.named_modules():
        above = compiled.above(name)
        found = Found(name or type(module).__name__, _name(type(module)))
        if isinstance(module, _Loss):
            reason = _COMPILED if above else cause or _loss_obstacle(module)
            yield Found(found.name, found.kind, None if reason else _REPLACEMENT, reason)
        elif above == [name]:
            yield Found(found.name, found.kind, reason=_COMPILED)


class _Compiled:
    """The names of the modules that are under torch.compile."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._names = [name for name, module in pl_module.named_modules() if _is_compiled(module)]

    def above(self, name: str) -> list[str]:
        """Those that a module is one of, or a part of."""
        # "" is the name of the whole, which is above all others.
        return [other for other in self._names if other == "" or name == other or name.startswith(f"{other}.")]


def _loss_obstacle(module: nn.Module) -> str | None:
    if type(module) is nn.CrossEntropyLoss:
        return None
    if isinstance(module, CrossEntropyLoss):
        return "it is lightkit's already"
    if isinstance(module, nn.CrossEntropyLoss):
        return f"it is a subclass of torch.nn.CrossEntropyLoss; what it calls of {_FUNCTION} is replaced"
    return "lightkit has no kernel for it"


def _is_compiled(module: nn.Module) -> bool:
    # The wrapper that torch.compile makes, a module compiled in place, and a LightningModule that Lightning has
    # taken out of its wrapper.
    return (
        is_instance(module, "torch._dynamo", "OptimizedModule")
        or (getattr(module, "_compiled_call_impl", None) is not None and not is_fused(module))
        or is_lightning_compiled(module)
    )


def _name(cls: type[Any]) -> str:
    """The name of a class as one writes it: `torch.optim.SGD`, not `torch.optim.sgd.SGD`."""
    for package in ("torch.optim", "torch.nn", "lightkit.optim", "lightkit.nn"):
        if cls.__module__.startswith(f"{package}."):
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
