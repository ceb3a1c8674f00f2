"""Local SGD: workers train on their own parts of the data, and average their weights now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightkit._lightning.loops import is_training_done
from lightkit._lightning.strategies import sync_module_states
from lightkit._util.deprecated import RenamedAttribute
from lightkit._util.strategy_traits import StrategyTraits
from lightkit.errors import ConfigError
from lightkit.strategies.flat import flat_buffers
from lightkit.strategies.parallel import Parallel

# Where a checkpoint keeps the states of the other workers' optimizers; worker 0's are where Lightning has them.
WORKERS_KEY = "lightkit_worker_optimizers"


class LocalSGD(Parallel):
    """Averages the weights of all workers every ``period`` steps, instead of their gradients in each [1]_.

    A step is one of the optimizer (the first, where there are several), however many batches it accumulates. In
    between, a worker sends nothing. The end of an epoch, a validation and a checkpoint average too, and begin a
    new period: what is measured and saved is the average.

    What is averaged are the parameters that are trained, and the running statistics of batch norms. Momentum and
    all else in an optimizer stay each worker's own, as do other buffers, of which a checkpoint has worker 0's.
    A checkpoint is an ordinary one, with the states of the other optimizers beside it: with as many workers it
    resumes exactly; a worker that it knows nothing of goes on with worker 0's state.

    Workers may have different numbers of batches: who comes to the end of an epoch waits there, and does not
    count in the averages of those that go on.

    Args:
        period: steps from one average to the next.
        **options: of Lightning's ``DDPStrategy``; those that concern gradients have no effect.

    Raises:
        ConfigError: a period below 1; at the start of a training, what cannot work with it: ``16-mixed``,
            ``sync_batchnorm``, ``master_weights`` of the optimizer, sharded modules.

    References:
        .. [1] Stich, Local SGD converges fast and communicates little, ICLR 2019.
    """

    traits = StrategyTraits(supports_lean_loop=True)
    takes_lean_steps = RenamedAttribute("traits.supports_lean_loop")

    def __init__(self, period: int = 16, **options: Any) -> None:
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise ConfigError(f"period must be a whole number of steps, at least 1, got {period!r}")
        super().__init__(**options)
        self.period = period
        # Of the first optimizer, since the last average; and whether any has stepped.
        self._own_steps, self._has_stepped = 0, False
        # Whether the weights of all workers are the same, and every worker knows.
        self._agreed = True
        self._trained: list[Tensor] = []

    def configure_ddp(self) -> None:
        """Gives all workers the weights of worker 0. Nothing is wrapped: gradients stay where they are."""
        super().configure_ddp()
        name = type(self).__name__
        if self._layer_sync is not None:
            raise ConfigError(f"{name}: sync_batchnorm communicates in every step, which this avoids; turn it off")
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                f"{name}: precision 16-mixed gives each worker a loss scale of its own; use bf16-mixed or 32-true"
            )
        sync_module_states(self.lightning_module)
        self._own_steps, self._has_stepped, self._agreed, self._trained = 0, False, True, []
        self._collect()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Makes the optimizers."""
        super().setup_optimizers(trainer)
        if any(group.get("master_weights") for optimizer in self.optimizers for group in optimizer.param_groups):
            raise ConfigError(
                f"{type(self).__name__}: with master_weights the optimizer would undo each average, which its float32 "
                "copies are no part of"
            )

    def _collect(self) -> None:
        """Looks up what is to be averaged, and makes room for it."""
        trained = [p for p in self.lightning_module.parameters() if p.requires_grad]
        if len(trained) == len(self._trained) and all(a is b for a, b in zip(trained, self._trained, strict=True)):
            return
        self._trained = trained
        self._parameters = flat_buffers(trained)
        norms = [m for m in self.lightning_module.modules() if isinstance(m, _NormBase)]
        statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
        self._statistics = flat_buffers(statistics)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Between epochs somebody may have frozen parameters or thawed some."""
        if self._agreed:
            self._collect()

    def after_step(self, optimizer: Optimizer) -> None:
        """The average, after a period of this worker's own steps or at the end of an epoch."""
        self._agreed, self._has_stepped = False, True
        if optimizer is self.optimizers[0] or optimizer is self._lightning_optimizers[0]:
            self.count_step()
            self._own_steps += 1
            if self.lightning_module.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self._average("end")
            elif self._own_steps >= self.period:
                self._average("period")

    def _average(self, at: str) -> None:
        """Takes part in an average, and at the end of an epoch in those of the workers that still go on.

        Args:
            at: ``period``; ``pause`` where what follows needs all workers at once; ``end`` of an epoch.
        """
        while True:
            facts = torch.tensor([self._has_stepped, at == "pause", at == "end"], device=self.root_device).float()
            dist.all_reduce(facts)
            workers, pausing, ended = map(int, facts.tolist())
            if 0 < pausing < self.world_size:
                raise ConfigError(
                    "the workers are at different steps at a validation or checkpoint in the middle of an epoch: that "
                    "needs equally many batches in each; validate and save at the end of epochs"
                )
            if workers:
                self._merge(self._has_stepped, workers)
            self._own_steps, self._has_stepped = 0, False
            if at != "end" or ended == self.world_size:
                break
        self._agreed = at != "period"

    def _merge(self, counts: bool, workers: int) -> None:
        """Gives all workers the mean of those that count: those that took a step."""
        for buffer in (*self._parameters, *self._statistics):
            buffer.load()
            buffer.average(counts, workers)
            buffer.store()
            self.count_bytes(buffer.nbytes)

    def _agree(self) -> None:
        """Averages where that has not happened since the last step."""
        trainer = self.lightning_module.trainer
        if not self._agreed and trainer.state.fn == TrainerFn.FITTING:
            loop = trainer.fit_loop.epoch_loop
            self._average("end" if loop.batch_progress.is_last_batch or is_training_done(loop) else "pause")

    def on_validation_start(self) -> None:
        """What is validated is the average."""
        self._agree()

    def on_train_end(self) -> None:
        """What a training leaves is the average."""
        self._agree()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The averaged weights: to be asked for on all workers, as ``trainer.save_checkpoint`` does."""
        self._agree()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint that holds the states of all workers' optimizers."""
        if self.world_size > 1 and "optimizer_states" in checkpoint:
            states = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, checkpoint["optimizer_states"])
            gathered = [None] * self.world_size if self.is_global_zero else None
            dist.gather_object(states, gathered)
            if gathered is not None:
                checkpoint[WORKERS_KEY] = gathered[1:]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives the optimizers the states that this worker had."""
        others = checkpoint.get(WORKERS_KEY, [])
        if 0 < self.global_rank <= len(others):
            checkpoint = {**checkpoint, "optimizer_states": others[self.global_rank - 1]}
        super().load_optimizer_state_dict(checkpoint)

    def check_work(self, batches: list[float]) -> None:
        """Unequal parts are fine, unless a number of steps ends the training: some would get there epochs later."""
        if len(set(batches)) > 1 and self.lightning_module.trainer.max_steps != -1:
            counts = ", ".join(f"{count:g}" for count in batches)
            raise ConfigError(
                f"max_steps needs equally many batches in each process, but they have {counts}; use max_epochs"
            )
