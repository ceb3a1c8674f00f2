"""Brings the lean training loop to any LightningModule."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightkit._lightning.loops import loaders_of_training
from lightkit.loops import LeanRun, PassGraphs, graph_obstacle, obstacle
from lightkit.loops.slicing import fetch_slices


class LeanLoop(Callback):
    """Takes most of Lightning's overhead out of a training step: ``Trainer(callbacks=[LeanLoop()])``.

    Weights, running values, counters, checkpoints, the hooks that somebody implements and their order are the
    same to the bit; see `lightkit.loops.LeanRun`. So are the metrics after a step that fails. What is not done in
    every step any more is what nobody sees there: collecting metrics that no logger takes, writing the loggers' files
    more than once a second, drawing a progress bar more than ten times a second, looking up hooks that are empty,
    checking the options of ``self.log`` anew. Callbacks, optimizers and hooks that are exchanged in the middle of an
    epoch take part from the next step on, and where somebody patches a function of Lightning's that a step calls, the
    steps are Lightning's. A trainer can be copied and pickled in the middle of a run; the copy has nothing of it.

    During a training, a program that looks closely sees these differences:

    ==================================== ===================================================================
    where                                what
    ==================================== ===================================================================
    training loop, ``vars``              ``run`` and ``__getstate__`` are attributes of the object
    module, ``vars``, in a lean step     ``log`` and ``__getstate__`` are attributes of the object
    loader that is sliced, ``vars``      ``_get_iterator`` and ``__getstate__`` are attributes of the object
    private running values, ``type``     ``DeferredMetric``, a subclass of Lightning's ``_ResultMetric``
    hooks patched on classes of others   are seen at the next epoch or after the next validation
    ==================================== ===================================================================

    A ``DataLoader`` over a ``TensorDataset`` gives the same batches by slicing: see
    `lightkit.loops.slicing.fetch_slices`.

    Works on one device, with Lightning's ``DDPStrategy`` and with the strategies of `lightkit.strategies`. Where
    Lightning's step is another one than this loop knows (manual optimization, FSDP, a GradScaler, a profiler, an
    overridden ``optimizer_step``) all stays as it is, and ``obstacle`` says why.

    With ``cuda_graphs``, on one GPU, forward and backward pass are taken from a CUDA graph: where the kernels are
    small, most of a step is Python launching them. Each shape of batch is captured once; batches of another shape than
    the first eight, and the first and last of an epoch, are taken as before. The optimizer, clipping, schedulers,
    logging and callbacks run every step; hooks between the two passes are called after both. A graph repeats what the
    GPU did, not what Python did: the first step is therefore watched, and ``graph_obstacle`` says why there is no graph
    where somebody implements ``on_before_zero_grad``, or the pass changes attributes, uses ``batch_idx``, the epoch or
    the step, draws random numbers on the CPU, waits for the GPU or logs a ``Metric``. Where callbacks and hooks change
    the module, move or freeze parameters, it is captured anew. What cannot be watched is up to you: variables outside
    of the module, files, the clock, and numbers in lists and dicts of the module that change within an epoch.
    Gradients, and tensors kept from inside of the pass, are overwritten in the next step.

    Args:
        cuda_graphs: take the passes from CUDA graphs, on a GPU.
    """

    def __init__(self, cuda_graphs: bool = False) -> None:
        self.cuda_graphs = cuda_graphs
        self.obstacle: str | None = None
        self._graphs: PassGraphs | None = None
        # By trainer: one callback may serve several, also one within the other.
        self._runs: dict[int, LeanRun] = {}
        self._undo: dict[int, ExitStack] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy, such as that of a trainer in the middle of a run, has changed nothing and has nothing to undo.
        return {**vars(self), "_graphs": None, "_runs": {}, "_undo": {}}

    @property
    def graph_obstacle(self) -> str | None:
        """Why the last run on a GPU has no CUDA graphs, or None."""
        return None if self._graphs is None else self._graphs.obstacle

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Changes the loop, when everything has been set up."""
        self.obstacle = obstacle(trainer)
        if self.obstacle is None:
            graphs = None
            if self.cuda_graphs and trainer.strategy.root_device.type == "cuda":
                graphs = self._graphs = PassGraphs(pl_module, graph_obstacle(trainer))
            self._runs[id(trainer)] = LeanRun(trainer.fit_loop.epoch_loop, graphs)
        else:
            rank_zero_warn(f"LeanLoop leaves Lightning's loop as it is: {self.obstacle}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the loaders slice, new ones among them."""
        if id(trainer) not in self._runs:
            return
        loaders, iterators = loaders_of_training(trainer)
        for loader in loaders:
            if (undo := fetch_slices(loader, iterators)) is not None:
                self._undo.setdefault(id(trainer), ExitStack()).callback(undo)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the loaders: the next epoch may have others."""
        self._undo.pop(id(trainer), ExitStack()).close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes all of it Lightning's and torch's again."""
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise, where the training does not come to its end."""
        self._restore(trainer)

    def _restore(self, trainer: pl.Trainer) -> None:
        self._undo.pop(id(trainer), ExitStack()).close()
        if (run := self._runs.pop(id(trainer), None)) is not None:
            run.undo()
