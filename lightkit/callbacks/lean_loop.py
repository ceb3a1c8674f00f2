"""A callback that trains any LightningModule with the lean training loop of `lightkit.loops`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightkit._lightning.loops import loaders_of_training
from lightkit._util.deprecated import RenamedAttribute
from lightkit.loops import LeanRun, PassGraphs, graph_unsupported_reason, unsupported_reason
from lightkit.loops.slicing import fetch_slices


class LeanLoop(Callback):
    """Removes most of Lightning's overhead from a training step: ``Trainer(callbacks=[LeanLoop()])``.

    Weights, running values, counters and checkpoints are the same as Lightning's to the bit, also after a step that
    fails, and the same overridden hooks run in the same order: see `lightkit.loops.LeanRun`. A lean step collects no
    metrics that no logger takes, writes the loggers' files once a second, draws a progress bar ten times a second,
    calls no empty hook and checks the options of ``self.log`` once. If a callback, an optimizer, or a hook of a
    callback or of the module is replaced within an epoch, the next step uses the new one. If a function of Lightning
    that a step calls is patched, Lightning runs the steps. A trainer can be copied and pickled during a run; the copy
    has Lightning's own loop.

    During a training a program can see these differences:

    ==================================== ===================================================================
    object                               difference
    ==================================== ===================================================================
    training loop, ``vars``              ``run`` and ``__getstate__`` are attributes of the object
    module, ``vars``, in a lean step     ``log`` and ``__getstate__`` are attributes of the object
    loader that is sliced, ``vars``      ``_get_iterator`` and ``__getstate__`` are attributes of the object
    private running values, ``type``     ``LazyMetric``, a subclass of Lightning's ``_ResultMetric``
    hook added to a class                takes effect at the next epoch or after the next validation
    ==================================== ===================================================================

    A ``DataLoader`` over a ``TensorDataset`` indexes whole batches of the tensors, which are the same batches: see
    `lightkit.loops.slicing.fetch_slices`.

    The callback supports one device, Lightning's ``DDPStrategy`` and the strategies of `lightkit.strategies`. If
    Lightning's step differs from the one that a lean step repeats (manual optimization, FSDP, a GradScaler, a profiler,
    an overridden ``optimizer_step``), the callback changes nothing, and ``unsupported_reason`` says why.

    With ``cuda_graphs``, on one GPU, a CUDA graph runs the forward and backward pass, since Python takes most of the
    time of a step with small kernels to launch them. Each shape of batch has a graph, eight shapes at most; Python runs
    other batches, and the first and the last batch of an epoch. The optimizer, clipping, schedulers, logging and
    callbacks run in every step; the hooks between the two passes run after both. A graph repeats what the GPU did and
    not what Python did. A recorder therefore watches the first step of a shape. There is no graph, and
    ``graph_unsupported_reason`` says why, if ``on_before_zero_grad`` is overridden or if the pass changes attributes,
    uses ``batch_idx``, the epoch or the step, draws random numbers on the CPU, waits for the GPU or logs a ``Metric``.
    If a callback or hook changes the module or moves or freezes parameters, the passes are captured again. The recorder
    does not see variables outside of the module, files, the clock, and numbers in lists and dicts of the module that
    change within an epoch. The next step overwrites the gradients and the tensors of the pass.

    Args:
        cuda_graphs: True runs the passes from CUDA graphs on a GPU.

    Attributes:
        unsupported_reason: the reason why Lightning's own loop ran the last training, or None.
    """

    obstacle = RenamedAttribute("unsupported_reason")
    graph_obstacle = RenamedAttribute("graph_unsupported_reason")

    def __init__(self, cuda_graphs: bool = False) -> None:
        self.cuda_graphs = cuda_graphs
        self.unsupported_reason: str | None = None
        self._graphs: PassGraphs | None = None
        # By trainer: one callback may serve several trainers, one of them within a run of another.
        self._runs: dict[int, LeanRun] = {}
        self._undo: dict[int, ExitStack] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The copy of a trainer within a run has changed nothing and has nothing to undo.
        return {**vars(self), "_graphs": None, "_runs": {}, "_undo": {}}

    @property
    def graph_unsupported_reason(self) -> str | None:
        """The reason why the last training on a GPU had no CUDA graphs, or None."""
        return None if self._graphs is None else self._graphs.unsupported_reason

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces ``run`` of the epoch loop by a `LeanRun`; warns if the trainer or the module does not allow it."""
        self.unsupported_reason = unsupported_reason(trainer)
        if self.unsupported_reason is None:
            graphs = None
            if self.cuda_graphs and trainer.strategy.root_device.type == "cuda":
                graphs = self._graphs = PassGraphs(pl_module, graph_unsupported_reason(trainer))
            self._runs[id(trainer)] = LeanRun(trainer.fit_loop.epoch_loop, graphs)
        else:
            rank_zero_warn(f"LeanLoop leaves Lightning's loop as it is: {self.unsupported_reason}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the data loaders of this epoch cut slices: see `fetch_slices`."""
        if id(trainer) not in self._runs:
            return
        loaders, iterators = loaders_of_training(trainer)
        for loader in loaders:
            if (undo := fetch_slices(loader, iterators)) is not None:
                self._undo.setdefault(id(trainer), ExitStack()).callback(undo)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the data loaders, because the next epoch may have others."""
        self._undo.pop(id(trainer), ExitStack()).close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the epoch loop and the data loaders."""
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restores the epoch loop and the data loaders after an error or Ctrl-C."""
        self._restore(trainer)

    def _restore(self, trainer: pl.Trainer) -> None:
        self._undo.pop(id(trainer), ExitStack()).close()
        if (run := self._runs.pop(id(trainer), None)) is not None:
            run.undo()
