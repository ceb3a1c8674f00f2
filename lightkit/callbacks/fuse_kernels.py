"""A callback that runs parts of any LightningModule on lightkit's kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
from lightkit.capture import Capture, Region, capture_calls, is_captured, is_within, module_names
from lightkit.errors import ArgumentError
from lightkit.memory import keep_freed_memory
from lightkit.nn import CrossEntropyLoss
from lightkit.ops import patch, patch_cross_entropy, patch_nll, patch_nll_loss
from lightkit.optim.convert import REPLACEMENTS, convert
from lightkit.optim.convert import unsupported_reason as optimizer_unsupported_reason

_FUNCTION = "torch.nn.functional.cross_entropy"
_NLL_FUNCTION = "torch.nn.functional.nll_loss"
_REPLACEMENT = "lightkit.ops.cross_entropy"
_COMPILED = "it is under torch.compile, whose graphs stay torch's"


@dataclass(frozen=True)
class Replacement:
    """An entry of `FuseKernels.report`: an optimizer, loss or region of a run, and its replacement.

    Args:
        name: the place of the object, such as ``optimizers[0]``, or the names of a region's modules.
        kind: the name of the object's class or function in the user's code, such as ``torch.optim.SGD``, or the names
            of a region's operations.
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
    """Runs the optimizers, the cross-entropy and the layers of any LightningModule on lightkit's kernels during a run.

    The callback takes the module unchanged: ``Trainer(callbacks=[FuseKernels()])``. The kernels run

    - optimizers of the classes ``torch.optim.SGD``, ``Adam`` and ``AdamW`` during a fit: see
      `lightkit.optim.convert`;
    - ``torch.nn.functional.cross_entropy`` in the thread of the trainer, however it is called, and thereby
      ``torch.nn.CrossEntropyLoss``, during fit, validate, test and predict: see
      `lightkit.ops.patch_cross_entropy`. Torch runs calls that the kernels do not cover and code under
      torch.compile;
    - on a CPU, a large ``torch.nn.functional.nll_loss`` of a log-softmax in the same way: see
      `lightkit.ops.patch_nll_loss`;
    - on a CPU, operations that the module calls one after the other, such as a convolution, a ReLU and a pool, as
      modules, functions or methods, in any code: see `lightkit.capture`.

    The module's code runs as it is, in every call. An operation that a kernel may compute together with later ones
    waits until its value is needed. The first batch of each kind is proof: the kernels and torch compute outputs and
    gradients of a few samples, and if the kernels' error against float64 is more than twice torch's, torch computes the
    region.

    The objects keep their classes: ``type(optimizer)``, ``type(net)``, ``match``, the model summary and a profiler show
    the user's classes. Copies and pickles of the objects are torch's, and torch.jit, torch.fx, torch.compile and
    torch.export see a module as it was. If another program patches a method of torch's classes, or a function
    that they call, before or during a run, the patch is called. A program can see these differences:

    ================================== =====================================================================
    object                             difference during a run
    ================================== =====================================================================
    ``vars(optimizer)``                ``step`` and ``__getstate__`` are attributes of the object
    hooks of ``load_state_dict``       the optimizer has one more of each kind
    ``vars(net)`` of a module          ``_compiled_call_impl`` is an attribute of the object
    ``net.forward``, called directly   runs torch's layers, outside of the module's call
    ``type(x)`` within a ``forward``   is a subclass of Tensor until the value of ``x`` is needed
    an error by torch, in a kernel     may be raised where the value is needed, some lines later
    ``F.cross_entropy.__code__``       is lightkit's; torch.jit.script cannot compile the function
    ``F.nll_loss.__code__``            is lightkit's, in the same way
    ``grad_fn`` of a result            is a node of lightkit
    state of half-precision ``Adam``   the moments are float32
    ================================== =====================================================================

    At the end of the run, or after an exception or Ctrl-C, the callback restores all objects. Checkpoints contain
    nothing of lightkit: a run without this callback can resume from a checkpoint of a run with it, and vice versa. A
    trainer can be copied and pickled during a run; in the copy nothing is replaced.

    The callback logs the replacements, those of layers at the first batch, and keeps them in ``report``. With a
    strategy that spawns processes, only the callbacks in the spawned processes have the report. Without native kernels
    for the trainer's device the callback replaces nothing, and one warning says why.

    Args:
        skip: patterns for the names of submodules that torch runs, with those in them, such as ``"encoder.*"``; ``*``
            stands for any characters, as in :mod:`fnmatch`.
        keep_memory: True keeps the memory of freed tensors for the next step, on a CPU, in the whole process and after
            the run: see `lightkit.memory.keep_freed_memory`.

    Raises:
        ArgumentError: ``skip`` is not a sequence of strings.
    """

    def __init__(self, skip: Sequence[str] = (), keep_memory: bool = True) -> None:
        if isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in skip):
            raise ArgumentError(f"FuseKernels: skip must be a list of patterns, got {skip!r}")
        self._skip = tuple(skip)
        self._keep_memory = keep_memory
        self._report: list[Replacement] = []
        # By trainer: one callback may serve several trainers, one of them within a run of another.
        self._undo: dict[int, ExitStack] = {}

    @property
    def report(self) -> tuple[Replacement, ...]:
        """A `Replacement` for each optimizer, loss and region of the last run; its ``str()`` is its log line."""
        return tuple(self._report)

    def table(self) -> None:
        """Prints the report: a row for each optimizer, loss and region, with its replacement or the reason for none."""
        print(format_table(self._report))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Patches the functions of losses before the module's ``setup``, unless kernels are missing."""
        self._restore(trainer)
        if _unsupported_reason(trainer) is not None:
            return
        if patch.PATCH.unsupported_reason() is None:
            self._undo_of(trainer).enter_context(patch_cross_entropy())
        if _nll_unsupported_reason(trainer) is None:
            self._undo_of(trainer).enter_context(patch_nll_loss())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Converts the optimizers, before their state is restored from a checkpoint; captures calls; reports."""
        self._replace_and_report(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Captures the calls of modules and reports, if the validation is not part of a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._replace_and_report(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Captures the calls of modules before a test, and reports."""
        self._replace_and_report(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Captures the calls of modules before a prediction, and reports."""
        self._replace_and_report(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores torch's optimizers, functions and calls of modules."""
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restores torch's optimizers, functions and calls of modules after an error or Ctrl-C."""
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
        if reason is None:
            self._capture(trainer, pl_module)
        function_reason = reason or patch.PATCH.unsupported_reason()
        self._report += _losses(pl_module, function_reason, compiled)
        replacement = None if function_reason else _REPLACEMENT
        self._report.append(Replacement(_FUNCTION, _FUNCTION, replacement, function_reason))
        nll = f"{_NLL_FUNCTION} of a log-softmax"
        nll_reason = _nll_unsupported_reason(trainer)
        self._report.append(Replacement(nll, nll, None if nll_reason else _REPLACEMENT, nll_reason))
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

    def _capture(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device.type
        if device != "cpu":
            self._report.append(Replacement("forward", "layers", reason=f"layers are torch's on {device}"))
            return
        if self._keep_memory:
            keep_freed_memory()
        capture = Capture(dict(module_names(pl_module)), self._add_region)
        undo = capture_calls(pl_module, capture, lambda name: any(fnmatchcase(name, p) for p in self._skip))
        self._undo_of(trainer).callback(undo)

    def _add_region(self, region: Region) -> None:
        found = Replacement(", ".join(region.names), ", ".join(region.operations), region.replacement, region.reason)
        self._report.append(found)
        rank_zero_info(f"FuseKernels: {found}")


def _unsupported_reason(trainer: pl.Trainer) -> str | None:
    reason = native.missing(trainer.strategy.root_device.type)
    return None if reason is None else f"there are no native kernels: {reason}"


def _nll_unsupported_reason(trainer: pl.Trainer) -> str | None:
    device = trainer.strategy.root_device.type
    reason = _unsupported_reason(trainer) or patch_nll.PATCH.unsupported_reason()
    return reason or (None if device == "cpu" else f"it is torch's on {device}")


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
        return [other for other in self._names if is_within(name, other)]


def _loss_unsupported_reason(module: nn.Module) -> str | None:
    if type(module) is nn.CrossEntropyLoss:
        return None
    if isinstance(module, nn.NLLLoss):
        return f"what it calls of {_NLL_FUNCTION} is replaced behind a log-softmax"
    if isinstance(module, CrossEntropyLoss):
        return "it is lightkit's already"
    if isinstance(module, nn.CrossEntropyLoss):
        return f"it is a subclass of torch.nn.CrossEntropyLoss; what it calls of {_FUNCTION} is replaced"
    return "lightkit has no kernel for it"


def _is_compiled(module: nn.Module) -> bool:
    # A wrapper by torch.compile, a module compiled in place, or a LightningModule out of its wrapper.
    return (
        is_instance(module, "torch._dynamo", "OptimizedModule")
        or (getattr(module, "_compiled_call_impl", None) is not None and not is_captured(module))
        or is_lightning_compiled(module)
    )


def _name(cls: type) -> str:
    """Returns the public name of a class: `torch.optim.SGD`, not `torch.optim.sgd.SGD`."""
    for package in ("torch.optim", "torch.nn", "lightkit.optim", "lightkit.nn"):
        if cls.__module__.startswith(f"{package}."):
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def format_table(report: Sequence[Replacement]) -> str:
    """Returns a table with the columns "place", "operations", "runs as" and "why not"."""
    rows = [("place", "operations", "runs as", "why not")]
    rows += [(f.name, f.kind, f.replacement or f.kind, f.reason or "") for f in report]
    widths = [min(max(len(row[i]) for row in rows), 60) for i in range(3)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )
