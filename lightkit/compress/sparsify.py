"""A callback that sets the smallest weights to zero during a training, and keeps them there."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightkit._util.packed_masks import pack_mask, unpack_mask
from lightkit._util.printable import printable
from lightkit._util.strategy_traits import LocalTrainer, WeightServers
from lightkit.compress.distil import Distil, begin_distillation
from lightkit.compress.magnitudes import MIN_SHARE, check_sharded, is_sharded, sharded_like, smallest_masked, whole
from lightkit.compress.training_support import (
    LOCAL,
    SERVED,
    SHARDED,
    WHOLE,
    callbacks_of,
    check_share,
    check_training,
    decide_together,
    forget_best,
    round_steps,
    training_steps,
)
from lightkit.errors import CheckpointError, ConfigError
from lightkit.optim import masks_of, set_masks
from lightkit.optim.masked_entries import local_part


class Sparsify(Callback):
    """Sets the smallest weights of any LightningModule to zero: ``Trainer(callbacks=[Sparsify(zeros=0.9)])``.

    The weights of all layers compete by magnitude [1]_, and the share of zeros grows from round to round by the cubic
    schedule of Zhu and Gupta [2]_, so that the other weights can take over. Biases, norms and other vectors have no
    zeros, and neither have weights that the optimizer does not step. Zeros stay zeros with every optimizer and
    precision: they are masks of the optimizer, which sets the weights to zero within its step, see
    `lightkit.optim.set_masks`. The averages and master weights of lightkit's optimizers are masked too.

    With `lightkit.strategies.LocalSGD` and `DiLoCo` a round comes with the first average at or after its step, where
    all workers have the same weights; the shared weights and the outer momentum of `DiLoCo` are masked as well. With
    ``fully_shard`` under Lightning's ``ModelParallelStrategy`` the weights of all shards compete. With
    `lightkit.strategies.ParameterServer` worker 0 chooses, and its masks go with its next gradient: from that update on
    the servers keep the zeros, for workers that come later and over restarts, too.

    A checkpoint with many zeros is much smaller once it is zipped. The model is not faster, since the layers multiply
    zeros like other numbers: `lightkit.compress.Prune` makes layers smaller. Together they compress most: the masks
    lose what is pruned.

    The masks are in the checkpoints as plain tensors, and a training resumes at any step, to the bit like one that was
    not interrupted. At each round, checkpoints and early stopping forget the scores so far.

    Args:
        zeros: the share of the weights of convolutions, linear, recurrent and embedding layers that is zero at the end,
            from 0 to below 1.
        start: the share of the training's steps before the first round.
        end: the share before the last round.
        rounds: the number of rounds.

    Attributes:
        masks: for each masked parameter a bool tensor, False where a weight stays zero; an empty dict before the first
            round, and with a parameter server at other workers than worker 0.

    Raises:
        ConfigError: an argument is out of its range; or the training cannot be masked, see
            `lightkit.compress.training_support.check_training`.

    References:
        .. [1] Han, Pool, Tran and Dally, Learning both Weights and Connections for Efficient Neural Networks, NeurIPS
           2015.
        .. [2] Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for model compression, 2017.
    """

    teaches_with_dense_model = True

    def __init__(self, zeros: float = 0.9, start: float = 0.4, end: float = 0.75, rounds: int = 8) -> None:
        self.zeros = check_share("zeros", zeros)
        if self.zeros > 1 - MIN_SHARE:
            raise ConfigError(f"zeros must be at most {1 - MIN_SHARE}, got {zeros!r}")
        self.start, self.end = check_share("start", start), check_share("end", end)
        if self.end < self.start:
            raise ConfigError(f"end must be at least start, which is {start}, got {end}")
        if type(rounds) is not int or rounds < 1:
            raise ConfigError(f"rounds must be a whole number, at least 1, got {rounds!r}")
        self.rounds = rounds
        self._finished_rounds = 0
        self._seen_step = -1
        # The latest round whose masks the weights of this process have, if the weights are on servers.
        self._seen_round = 0
        self._round_steps: list[int] = []
        self.masks: dict[Tensor, Tensor] = {}
        self._names: dict[Tensor, str] = {}
        # The masks of a checkpoint, packed to bits, by the name of a parameter.
        self._loaded: dict[str, Tensor] = {}

    @property
    def sparsity(self) -> float:
        """The share of masked weights in the tensors that have masks; of this process's shards; 0 without masks."""
        masks = [local_part(mask) for mask in self.masks.values()]
        total = sum(mask.numel() for mask in masks)
        return sum(int((~mask).sum()) for mask in masks) / total if total else 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the masks of an earlier training."""
        if stage == "fit":
            self._finished_rounds, self._seen_step = 0, -1
            self.masks, self._names, self._loaded = {}, {}, {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rejects a training whose weights cannot be masked."""
        check_training("Sparsify", trainer, pl_module, WHOLE | LOCAL | SHARDED | SERVED, "with and without zeros")
        distils = any(isinstance(callback, Distil) and not callback.has_teacher for callback in callbacks_of(trainer))
        if distils and isinstance(trainer.strategy, WeightServers):
            raise ConfigError(
                "Sparsify: with a parameter server the masks reach a worker at any step, so that none knows the dense "
                "model at the end; give Distil a teacher"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes the steps of the rounds, and applies the masks of the checkpoint."""
        total = training_steps("Sparsify", trainer)
        self._round_steps = round_steps("Sparsify", self.start, self.end, self.rounds, total)
        # A trainable weight that the optimizer does not step, such as that of a backbone, keeps its values.
        stepped = {p for group in trainer.optimizers[0].param_groups for p in group["params"] if p.requires_grad}
        self._names = {p: name for name, p in pl_module.named_parameters() if p.dim() > 1 and p in stepped}
        if not self._names:
            raise ConfigError("Sparsify: no weight with two or more dimensions is trained")
        parameters = {name: p for p, name in self._names.items()}
        check_sharded("Sparsify", parameters)
        masks: dict[Tensor, Tensor] = {}
        for name, packed in self._loaded.items():
            parameter = parameters.get(name)
            if parameter is None or packed.numel() != -(-parameter.numel() // 8):
                raise CheckpointError(f"the mask of {printable(name)} in the checkpoint does not fit the model")
            masks[parameter] = sharded_like(parameter, unpack_mask(packed, parameter.shape))
        self._loaded, self._seen_round = {}, self._finished_rounds
        self._set(trainer, masks)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Renews the masks after the step of a round."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        if isinstance(trainer.strategy, WeightServers):
            self._follow(trainer, trainer.strategy)
        if self._finished_rounds >= self.rounds:
            return
        if isinstance(trainer.strategy, WeightServers) and not trainer.is_global_zero:
            return
        if not decide_together(trainer, step >= self._round_steps[self._finished_rounds]):
            return
        begin_distillation(trainer, pl_module)
        # An average may come after the steps of several rounds.
        passed = sum(step >= due for due in self._round_steps)
        self._finished_rounds = trainer.strategy.broadcast(max(passed, self._finished_rounds + 1))
        self._set(trainer, self._choose(trainer))
        if not isinstance(trainer.strategy, WeightServers):
            self._begin_round(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if the training has ended before the last round."""
        if self._finished_rounds < self.rounds:
            rank_zero_warn(
                f"Sparsify: the training ended before round {self._finished_rounds + 1} of {self.rounds}: "
                f"{self.sparsity:.1%} of the weights are masked"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of finished rounds and the masks, packed to bits, as plain containers and tensors."""
        masks = {self._names[p]: pack_mask(whole(mask)) for p, mask in self.masks.items()}
        return {"rounds": self._finished_rounds, "masks": masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state that `state_dict` returned; the masks are applied when the training starts.

        Raises:
            CheckpointError: the state has other types.
        """
        rounds, masks = state_dict.get("rounds"), state_dict.get("masks")
        if not (isinstance(rounds, int) and isinstance(masks, dict)) or rounds < 0:
            raise CheckpointError("the state of Sparsify in the checkpoint is damaged")
        tensors = [mask for mask in masks.values() if isinstance(mask, Tensor)]
        if len(tensors) < len(masks) or any(mask.dtype != torch.uint8 or mask.dim() != 1 for mask in tensors):
            raise CheckpointError("the state of Sparsify in the checkpoint is damaged")
        self._finished_rounds, self._loaded = rounds, dict(masks)

    def _target(self) -> float:
        """Returns the share of zeros after the finished rounds."""
        return self.zeros * (1 - (1 - self._finished_rounds / self.rounds) ** 3)

    def _follow(self, trainer: pl.Trainer, strategy: WeightServers) -> None:
        """Notices masks that have come with the weights; the worker that chose them has waited for that, too."""
        number = strategy.mask_number
        if number > self._seen_round:
            self._seen_round = number
            if number > self._finished_rounds:
                # Another process has chosen them: another worker, or the one that this one replaces.
                self._finished_rounds = number
                self.masks = strategy.fetch_masks() if trainer.is_global_zero else {}
            self._begin_round(trainer)

    def _begin_round(self, trainer: pl.Trainer) -> None:
        """Forgets the scores of the weights before the masks, and prints the share of zeros at the end."""
        forget_best(trainer)
        if self._finished_rounds == self.rounds and self.masks:
            masks = [whole(mask) for mask in self.masks.values()]
            share = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
            if trainer.is_global_zero:
                print(f"masked {share:.1%} of the weights", flush=True)

    def _choose(self, trainer: pl.Trainer) -> dict[Tensor, Tensor]:
        """Returns the masks of the finished rounds, the same in all processes."""
        masks = smallest_masked(list(self._names), self._target())
        if any(map(is_sharded, masks)) or isinstance(trainer.strategy, WeightServers):
            return masks
        packed = trainer.strategy.broadcast([pack_mask(mask) for mask in masks.values()])
        return {p: unpack_mask(mask, p.shape).to(p.device) for p, mask in zip(masks, packed, strict=True)}

    def _set(self, trainer: pl.Trainer, masks: dict[Tensor, Tensor]) -> None:
        if isinstance(trainer.strategy, WeightServers):
            self.masks = masks
            trainer.strategy.set_masks(masks, self._finished_rounds if masks else 0)
            return
        (optimizer,) = trainer.optimizers
        set_masks(optimizer, masks)
        # `Prune` exchanges the entries of the optimizer's masks.
        self.masks = masks_of(optimizer)
        if isinstance(trainer.strategy, LocalTrainer):
            trainer.strategy.set_masks(self.masks)
