"""A callback that runs parts of any LightningModule on lightkit's kernels."""

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
from lightkit.optim.convert import unsupported_reason as optimizer_unsupported_reason

_FUNCTION = "torch.nn.functional.cross_entropy"
_REPLACEMENT = "lightkit.ops.cross_entropy"
_FUSED = "it is on lightkit's kernels already"
_COMPILED = "it is under torch.compile, whose graphs stay torch's"


@dataclass(frozen=True)
class Replacement:
    """An entry of `FuseKernels.report`: an optimizer, loss or Sequential of a run, and its replacement.

    Args:
        name: the place of the object, such as ``optimizers[0]`` or the name of a submodule.
        kind: the name of the object's class or function in the user's code, such as ``torch.optim.SGD``.
        replacement: the name of the class or function of lightkit that runs instead; None if the object was kept.
        reason: the reason why the object was kept; None if it was replaced.
    """

    name: str
    kind: str
    replacement: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        outcome = f"kept: {self.reason}" if self.replacement is None else f"replaced by {self.replacement}"
        return f"{self.name}: {outcome}" if self.name == self.kind else f"{self.name} ({self.kind}): {outcome}"


class FuseKernels(Callback):
    """Runs optimizers, cross-entropy and convolution blocks of torch on lightkit's kernels during a run.

    The callback takes any LightningModule unchanged: ``Trainer(callbacks=[FuseKernels()])``. The kernels run

    - optimizers of the classes ``torch.optim.SGD``, ``Adam`` and ``AdamW`` during a fit: see
      `lightkit.optim.convert`;
    - ``torch.nn.functional.cross_entropy`` in the thread of the trainer, however it is called, and thereby
      ``torch.nn.CrossEntropyLoss``, during fit, validate, test and predict: see
      `lightkit.ops.patch_cross_entropy`. Torch runs calls that the kernels do not cover and code under
      torch.compile;
    - on a CPU, each ``torch.nn.Sequential`` with layers that form one operation, such as a convolution and a ReLU,
      during fit, validate, test and predict: see `lightkit.nn.FusedSequential`.

    The objects keep their classes: ``type(optimizer)``, ``type(net)``, ``match``, the model summary and a profiler show
    the user's classes. Copies and pickles of the objects are torch's, and torch.jit, torch.fx, torch.compile and
    torch.export see a ``Sequential`` as it was. If another program patches a method of torch's classes, or a function
    that they call, before or during a run, the patch is called. A program can see these differences:

    ================================== =====================================================================
    object                             difference during a run
    ================================== =====================================================================
    ``vars(optimizer)``                ``step`` and ``__getstate__`` are attributes of the object
    hooks of ``load_state_dict``       the optimizer has one more of each kind
    ``vars(net)`` of a fused net       ``_compiled_call_impl`` is an attribute of the object
    ``net.forward``, called directly   runs torch's layers; so does the call of a net with hooks
    ``F.cross_entropy.__code__``       is lightkit's; torch.jit.script cannot compile the function
    ``grad_fn`` of a result            is a node of lightkit
    state of half-precision ``Adam``   the moments are float32
    ================================== =====================================================================

    At the end of the run, or after an exception or Ctrl-C, the callback restores all objects. Checkpoints contain
    nothing of lightkit: a run without this callback can resume from a checkpoint of a run with it, and vice versa. A
    trainer can be copied and pickled during a run; in the copy nothing is replaced.

    The callback logs the replacements once per run and keeps them in ``report``. With a strategy that spawns processes,
    only the callbacks in the spawned processes have the report. Without native kernels for the trainer's device the
    callback replaces nothing, and one warning says why.
    """

    def __init__(self) -> None:
        self._report: list[Replacement] = []
        # By trainer: one callback may serve several trainers, one of them within a run of another.
        self._undo: dict[int, ExitStack] = {}

    @property
    def report(self) -> tuple[Replacement, ...]:
        """A `Replacement` for each optimizer, loss and Sequential of the last run; its ``str()`` is its log line."""
        return tuple(self._report)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Patches ``torch.nn.functional.cross_entropy`` before the module's ``setup``, unless kernels are missing."""
        self._restore(trainer)
        if _unsupported_reason(trainer) is None and patch.unsupported_reason() is None:
            self._undo_of(trainer).enter_context(patch_cross_entropy())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Converts the optimizers, before their state is restored from a checkpoint; fuses Sequentials; reports."""
        self._replace_and_report(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fuses the Sequentials and reports, if the validation is not part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._replace_and_report(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fuses the Sequentials before a test, and reports."""
        self._replace_and_report(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fuses the Sequentials before a prediction, and reports."""
        self._replace_and_report(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores torch's optimizers, functions and Sequentials."""
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restores torch's optimizers, functions and Sequentials after an error or Ctrl-C."""
        self._restore(trainer)

    def __getstate__(self) -> dict[str, Any]:
        # The copy of a trainer within a run has replaced nothing and has nothing to undo.
        return {**vars(self), "_undo": {}}

    def _undo_of(self, trainer: pl.Trainer) -> ExitStack:
        return self._undo.setdefault(id(trainer), ExitStack())

    def _restore(self, trainer: pl.Trainer) -> None:
        self._undo.pop(id(trainer), ExitStack()).close()

    def _replace_and_report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reason = _unsupported_reason(trainer)
        self._report = []
        if trainer.state.fn == TrainerFn.FITTING:
            self._report += [self._convert(trainer, i, reason) for i in range(len(trainer.optimizers))]
        compiled = _CompiledModules(pl_module)
        self._report += self._fuse(trainer, pl_module, reason, compiled)
        function_reason = reason or patch.unsupported_reason()
        self._report += _losses(pl_module, function_reason, compiled)
        replacement = None if function_reason else _REPLACEMENT
        self._report.append(Replacement(_FUNCTION, _FUNCTION, replacement, function_reason))
        if reason is not None:
            rank_zero_warn(f"FuseKernels replaces nothing: {reason}")
        else:
            rank_zero_info("\n  ".join(["FuseKernels:", *map(str, self._report)]))

    def _convert(self, trainer: pl.Trainer, index: int, reason: str | None) -> Replacement:
        optimizer = trainer.optimizers[index]
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        name, cls = f"optimizers[{index}]", type(optimizer)
        reason = reason or optimizer_unsupported_reason(optimizer)
        if reason is not None:
            return Replacement(name, _name(cls), reason=reason)
        self._undo_of(trainer).callback(convert(optimizer))
        return Replacement(name, _name(cls), replacement=_name(REPLACEMENTS[cls]))

    def _fuse(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, run_reason: str | None, compiled: _CompiledModules
    ) -> Iterator[Replacement]:
        """Fuses each Sequential with layers that can be fused, and yields an entry of the report for each."""
        device = trainer.strategy.root_device.type
        if device != "cpu":
            run_reason = f"convolutions are torch's on {device}"
        for name, module in pl_module.named_modules():
            if type(module) is nn.Sequential and can_fuse(module):
                reason = run_reason or (_COMPILED if compiled.above(name) else _FUSED if is_fused(module) else None)
                if reason is None:
                    self._undo_of(trainer).callback(FusedCall(module).undo)
                replacement = None if reason else "lightkit.nn.FusedSequential"
                yield Replacement(name, "torch.nn.Sequential", replacement, reason)


def _unsupported_reason(trainer: pl.Trainer) -> str | None:
    reason = native.missing(trainer.strategy.root_device.type)
    return None if reason is None else f"there are no native kernels: {reason}"


def _losses(pl_module: pl.LightningModule, run_reason: str | None, compiled: _CompiledModules) -> Iterator[Replacement]:
    """Yields an entry of the report for each loss module, and for each module that the user compiled."""
    for name, module in pl_module.named_modules():
        above = compiled.above(name)
        is_compiled_itself = above == [name]
        name, kind = name or type(module).__name__, _name(type(module))
        if isinstance(module, _Loss):
            reason = _COMPILED if above else run_reason or _loss_unsupported_reason(module)
            yield Replacement(name, kind, None if reason else _REPLACEMENT, reason)
        elif is_compiled_itself:
            yield Replacement(name, kind, reason=_COMPILED)


class _CompiledModules:
    """The names of the modules under torch.compile."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._names = [name for name, module in pl_module.named_modules() if _is_compiled(module)]

    def above(self, name: str) -> list[str]:
        """Returns the names of the compiled modules that are the module ``name`` or contain it."""
        # "" is the name of the root, which contains all others.
        return [other for other in self._names if other == "" or name == other or name.startswith(f"{other}.")]


def _loss_unsupported_reason(module: nn.Module) -> str | None:
    if type(module) is nn.CrossEntropyLoss:
        return None
    if isinstance(module, CrossEntropyLoss):
        return "it is lightkit's already"
    if isinstance(module, nn.CrossEntropyLoss):
        return f"it is a subclass of torch.nn.CrossEntropyLoss; what it calls of {_FUNCTION} is replaced"
    return "lightkit has no kernel for it"


def _is_compiled(module: nn.Module) -> bool:
    # A wrapper by torch.compile, a module compiled in place, or a LightningModule out of its wrapper.
    return (
        is_instance(module, "torch._dynamo", "OptimizedModule")
        or (getattr(module, "_compiled_call_impl", None) is not None and not is_fused(module))
        or is_lightning_compiled(module)
    )


def _name(cls: type) -> str:
    """Returns the public name of a class: `torch.optim.SGD`, not `torch.optim.sgd.SGD`."""
    for package in ("torch.optim", "torch.nn", "lightkit.optim", "lightkit.nn"):
        if cls.__module__.startswith(f"{package}."):
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
