"""Local SGD: workers train on their shards of the data, and average their weights periodically."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
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

# The key of a checkpoint with the optimizer states of the workers except worker 0; Lightning saves those of worker 0.
WORKERS_KEY = "lightkit_worker_optimizers"


class LocalSGD(Parallel):
    """Averages the weights of all workers every ``period`` steps, instead of their gradients in each step [1]_.

    A step is an optimizer step, of the first optimizer if there are several, however many batches it accumulates.
    Between two averages a worker sends nothing. The end of an epoch, a validation and a checkpoint average too, and
    begin a new period: Lightning validates and saves the average.

    The strategy averages the trained parameters and the running statistics of batch norms. Each worker keeps its own
    optimizer state and its own other buffers; a checkpoint has the other buffers of worker 0. A checkpoint is an
    ordinary one, with the optimizer states of the other workers under another key: with the same number of workers a
    run resumes exactly, and an additional worker starts with the optimizer state of worker 0.

    Workers may have different numbers of batches: a worker at the end of its epoch waits for the others, and does not
    count in their averages.

    Args:
        period: the number of steps of a worker from one average to the next.
        **options: arguments of Lightning's ``DDPStrategy``; the arguments about gradients have no effect.

    Raises:
        ConfigError: ``period`` is below 1; at the start of a training, the run uses ``16-mixed``, ``sync_batchnorm``,
            ``master_weights`` of an optimizer, or sharded modules.

    References:
        .. [1] Stich, Local SGD converges fast and communicates little, ICLR 2019.
    """

    traits = StrategyTraits(supports_lean_loop=True, trains_locally=True)
    takes_lean_steps = RenamedAttribute("traits.supports_lean_loop")

    def __init__(self, period: int = 16, **options: Any) -> None:
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise ConfigError(f"period must be a whole number of steps, at least 1, got {period!r}")
        super().__init__(**options)
        self.period = period
        # Steps of the first optimizer since the latest average; True if any optimizer has stepped since then.
        self._own_steps, self._has_stepped = 0, False
        # True while the weights of all workers are the same, and every worker knows that.
        self._agreed = True
        # True from an average of workers that all go on until their next step.
        self._is_common = True
        self._trained: list[nn.Parameter] = []

    def configure_ddp(self) -> None:
        """Copies the weights of worker 0 to all workers; wraps no module, since gradients stay with their worker."""
        super().configure_ddp()
        name = type(self).__name__
        if self._layer_sync is not None:
            raise ConfigError(f"{name}: sync_batchnorm communicates in every step, which this avoids; turn it off")
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                f"{name}: precision 16-mixed gives each worker a loss scale of its own; use bf16-mixed or 32-true"
            )
        sync_module_states(self.trained_module)
        self._own_steps, self._has_stepped, self._agreed, self._trained = 0, False, True, []
        self._collect()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Makes the optimizers; rejects ``master_weights``."""
        super().setup_optimizers(trainer)
        if any(group.get("master_weights") for optimizer in self.optimizers for group in optimizer.param_groups):
            raise ConfigError(
                f"{type(self).__name__}: with master_weights the optimizer would undo each average: it steps float32 "
                "copies, which are not averaged"
            )

    @property
    def has_common_weights(self) -> bool:
        """True after a step in which all workers have averaged, unless one waits for the end of the others' epoch."""
        return self._is_common

    def set_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Does nothing, since the mean of zeros is zero; `DiLoCo` masks its shared weights.

        Args:
            masks: for each masked parameter a bool tensor, False where an entry is zero; the same in all workers.
        """

    def outer_state(self) -> Optimizer | None:
        """Returns None: there is no outer optimizer."""
        return None

    def resize(self, outer_state: Optimizer | None) -> None:
        """Goes on with parameters of other shapes, which are the same in all workers.

        Args:
            outer_state: what `outer_state` has returned, with the new shapes.
        """
        self._trained = []
        self._collect()

    def _collect(self) -> None:
        """Allocates buffers for the trained parameters and the running statistics, if the parameters have changed."""
        trained = [p for p in self.trained_module.parameters() if p.requires_grad]
        if len(trained) == len(self._trained) and all(a is b for a, b in zip(trained, self._trained, strict=True)):
            return
        self._trained = trained
        self._parameters = flat_buffers(trained)
        norms = [m for m in self.trained_module.modules() if isinstance(m, _NormBase)]
        statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
        self._statistics = flat_buffers(statistics)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Collects the trained parameters anew if a callback has frozen or thawed some after an average."""
        if self._agreed:
            self._collect()

    def after_step(self, optimizer: Optimizer) -> None:
        """Averages the weights after ``period`` steps of this worker, and at the end of an epoch."""
        self._agreed, self._has_stepped, self._is_common = False, True, False
        if optimizer is self.optimizers[0] or optimizer is self._lightning_optimizers[0]:
            self.count_step()
            self._own_steps += 1
            if self.trained_module.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self._average("end")
            elif self._own_steps >= self.period:
                self._average("period")

    def _average(self, at: Literal["period", "pause", "end"]) -> None:
        """Takes part in an average, and at the end of an epoch in all averages of the workers that still train.

        Args:
            at: ``"period"`` after ``period`` steps; ``"pause"`` before a validation or a checkpoint, which need all
                workers; ``"end"`` at the end of an epoch.
        """
        while True:
            flags = torch.tensor([self._has_stepped, at == "pause", at == "end"], device=self.root_device).float()
            dist.all_reduce(flags)
            workers, pausing, ended = map(int, flags.tolist())
            if 0 < pausing < self.world_size:
                raise ConfigError(
                    "the workers are at different steps at a validation or checkpoint in the middle of an epoch: that "
                    "needs equally many batches in each; validate and save at the end of epochs"
                )
            if workers:
                self._merge(self._has_stepped, workers)
            self._own_steps, self._has_stepped = 0, False
            self._is_common = ended in (0, self.world_size)
            if at != "end" or ended == self.world_size:
                break
        self._agreed = at != "period"

    def _merge(self, counts: bool, workers: int) -> None:
        """Sets the weights of all workers to the mean over the workers that have stepped since the latest average.

        Args:
            counts: True if this worker has stepped.
            workers: the number of workers that have stepped.
        """
        for buffer in (*self._parameters, *self._statistics):
            buffer.load()
            buffer.average(counts, workers)
            buffer.store()
            self.count_bytes(buffer.nbytes)

    def _agree(self) -> None:
        """Averages the weights during a fit, unless the workers have averaged since the latest step."""
        trainer = self.trained_module.trainer
        if not self._agreed and trainer.state.fn == TrainerFn.FITTING:
            loop = trainer.fit_loop.epoch_loop
            self._average("end" if loop.batch_progress.is_last_batch or is_training_done(loop) else "pause")

    def on_validation_start(self) -> None:
        """Averages the weights, so that Lightning validates the average."""
        self._agree()

    def on_train_end(self) -> None:
        """Averages the weights, so that the training ends with the average."""
        self._agree()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the averaged weights; all workers must call this, as ``trainer.save_checkpoint`` does."""
        self._agree()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint, to which it adds the optimizer states of the other workers; all workers must call it."""
        if self.world_size > 1 and "optimizer_states" in checkpoint:
            states = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, checkpoint["optimizer_states"])
            gathered: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
            dist.gather_object(states, gathered)
            if gathered is not None:
                checkpoint[WORKERS_KEY] = gathered[1:]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the optimizer states of this worker."""
        others = checkpoint.get(WORKERS_KEY, [])
        if 0 < self.global_rank <= len(others):
            states = zip(checkpoint["optimizer_states"], others[self.global_rank - 1], strict=True)
            # The hyperparameters are those of worker 0, which a callback may have changed for this run.
            own = [{**theirs, "param_groups": shared["param_groups"]} for shared, theirs in states]
            checkpoint = {**checkpoint, "optimizer_states": own}
        super().load_optimizer_state_dict(checkpoint)

    def check_work(self, batches: list[float]) -> None:
        """Rejects different numbers of batches with ``max_steps``, which some workers would reach epochs later.

        Args:
            batches: the number of batches of each worker in an epoch; infinite if unknown.

        Raises:
            ConfigError: the numbers differ, and the Trainer has ``max_steps``.
        """
        if len(set(batches)) > 1 and self.trained_module.trainer.max_steps != -1:
            counts = ", ".join(f"{count:g}" for count in batches)
            raise ConfigError(
                f"max_steps needs equally many batches in each process; they have {counts}: use max_epochs"
            )
