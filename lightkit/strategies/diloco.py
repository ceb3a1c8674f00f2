"""DiLoCo: local training with an outer optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightkit._util.deprecated import RenamedAttribute
from lightkit._util.strategy_traits import StrategyTraits
from lightkit.errors import CheckpointError, ConfigError
from lightkit.optim import SGD, set_masks
from lightkit.strategies.local_sgd import LocalSGD

# The key of a checkpoint with the state of the outer optimizer.
OUTER_KEY = "lightkit_outer_optimizer"


class DiLoCo(LocalSGD):
    """Trains locally, and steps an outer SGD with Nesterov momentum along the workers' mean change [1]_.

    After each period the outer optimizer steps from the shared weights; its gradient is the negated mean of the
    workers' changes. All workers continue with the result. With ``outer_lr=1`` and ``outer_momentum=0`` the strategy
    equals `LocalSGD`, which also describes the rest: every average of `LocalSGD` is an outer step here. A validation
    or a checkpoint within a period causes an outer step with a small gradient and the full momentum: choose a period
    that divides the number of steps between validations and between checkpoints.

    A checkpoint has the outer momentum; the shared weights are those of the checkpoint.

    Args:
        period: the number of steps of a worker from one outer step to the next.
        outer_lr: the learning rate of the outer optimizer.
        outer_momentum: the Nesterov momentum of the outer optimizer; 0 for none.
        **options: see `LocalSGD`.

    Raises:
        ConfigError: a value is out of its range, or for a reason that `LocalSGD` lists.

    References:
        .. [1] Douillard et al., DiLoCo: distributed low-communication training of language models, 2023.
    """

    traits = StrategyTraits(supports_lean_loop=True, trains_locally=True)
    takes_lean_steps = RenamedAttribute("traits.supports_lean_loop")

    def __init__(self, period: int = 16, outer_lr: float = 0.7, outer_momentum: float = 0.9, **options: Any) -> None:
        super().__init__(period=period, **options)
        if not outer_lr > 0:
            raise ConfigError(f"outer_lr must be above 0, got {outer_lr!r}")
        if not 0 <= outer_momentum < 1:
            raise ConfigError(f"outer_momentum must be from 0 to below 1, got {outer_momentum!r}")
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self._masks: dict[Tensor, Tensor] = {}

    def configure_ddp(self) -> None:
        """Copies the weights of worker 0 to all workers, without the masks of an earlier training."""
        self._masks = {}
        super().configure_ddp()

    def set_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Keeps masked entries of the shared weights and of the outer momentum at zero.

        Args:
            masks: for each masked parameter a bool tensor, False where an entry is zero; the same in all workers.
        """
        self._masks = dict(masks)
        self._mask_shared()

    def outer_state(self) -> Optimizer:
        """Returns the outer momentum by the parameters of the module, as the state of an SGD that is never stepped."""
        found = torch.optim.SGD(self._trained, lr=self.outer_lr)
        for shared in self._shared:
            buffer = self._outer.state.get(shared, {}).get("momentum_buffer")
            if buffer is not None:
                members = self._members(shared)
                for parameter, part in zip(members, buffer.split([p.numel() for p in members]), strict=True):
                    found.state[parameter]["momentum_buffer"] = part.view(parameter.shape)
        return found

    def resize(self, outer_state: Optimizer | None) -> None:
        """Goes on with parameters of other shapes, which are the same in all workers.

        Args:
            outer_state: what `outer_state` has returned, with the new shapes.
        """
        super().resize(outer_state)
        if outer_state is None or not outer_state.state:
            return
        for shared in self._shared:
            parts = [outer_state.state[p]["momentum_buffer"].flatten() for p in self._members(shared)]
            self._outer.state[shared]["momentum_buffer"] = torch.cat(parts)

    def _members(self, shared: Tensor) -> list[nn.Parameter]:
        """Returns the parameters whose weights lie one after the other in a flat tensor of shared weights."""
        return [p for p in self._trained if (p.dtype, p.device) == (shared.dtype, shared.device)]

    @torch.no_grad()
    def _mask_shared(self) -> None:
        flat: dict[Tensor, Tensor] = {}
        for shared in self._shared if self._masks else ():
            parts = [self._masks.get(p, torch.ones_like(p, dtype=torch.bool)) for p in self._members(shared)]
            flat[shared] = torch.cat([part.flatten() for part in parts])
        set_masks(self._outer, flat)
        for shared, mask in flat.items():
            if (buffer := self._outer.state.get(shared, {}).get("momentum_buffer")) is not None:
                # From now on its gradients are 0 there.
                buffer.mul_(mask)

    def _collect(self) -> None:
        before = self._trained
        super()._collect()
        if self._trained is before:
            return
        # New parameters begin without outer momentum.
        for buffer in self._parameters:
            buffer.load()
        self._shared = [nn.Parameter(buffer.flat.clone()) for buffer in self._parameters]
        self._outer = SGD(
            self._shared, lr=self.outer_lr, momentum=self.outer_momentum, nesterov=self.outer_momentum > 0
        )
        self._mask_shared()

    def _merge(self, counts: bool, workers: int) -> None:
        for buffer, shared in zip(self._parameters, self._shared, strict=True):
            buffer.load()
            buffer.flat.neg_().add_(shared.detach())
            buffer.average(counts, workers)
            shared.grad = buffer.flat
            self.count_bytes(buffer.nbytes)
        self._outer.step()
        for buffer, shared in zip(self._parameters, self._shared, strict=True):
            buffer.flat.copy_(shared.detach())
            buffer.store()
        for buffer in self._statistics:
            buffer.load()
            buffer.average(counts, workers)
            buffer.store()
            self.count_bytes(buffer.nbytes)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint with the state of the outer optimizer."""
        if "optimizer_states" in checkpoint:
            checkpoint[OUTER_KEY] = self._outer.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the optimizers, and the outer momentum if the checkpoint has one.

        Raises:
            CheckpointError: the outer optimizer in the checkpoint has other parameters.
        """
        super().load_optimizer_state_dict(checkpoint)
        if (state := checkpoint.get(OUTER_KEY)) is None:
            return
        buffers = [entry["momentum_buffer"] for entry in state["state"].values() if "momentum_buffer" in entry]
        sizes = [b.numel() for b in buffers if isinstance(b, Tensor)]
        if sizes and sizes != [shared.numel() for shared in self._shared]:
            raise CheckpointError("the outer optimizer in the checkpoint has other parameters")
        self._outer.load_state_dict(state)
        for group in self._outer.param_groups:
            # The configuration of this run counts, not that of the checkpoint's run.
            group.update(lr=self.outer_lr, momentum=self.outer_momentum, nesterov=self.outer_momentum > 0)
