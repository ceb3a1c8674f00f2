"""Data parallel training with compressed gradients, on CPUs too."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightkit._lightning.strategies import register_ddp_comm_hook
from lightkit._util.deprecated import RenamedAttribute
from lightkit._util.strategy_traits import StrategyTraits
from lightkit.config import nearest
from lightkit.errors import ConfigError
from lightkit.strategies.parallel import Parallel

_COMPRESSIONS = ("none", "fp16", "bf16", "powersgd")

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}

# The first steps send whole gradients: PowerSGD approximates gradients well once they change slowly.
_POWERSGD_START = 10


class DataParallel(Parallel):
    """Averages the gradients of all processes in every step; each process trains on its shard of the data.

    The strategy is Lightning's ``DDPStrategy``, with communication hooks on every device (Lightning registers them for
    CUDA alone) and without the broadcast before each batch.

    Args:
        compression: the compression of the sent gradients: ``none``; ``fp16`` and ``bf16``, which halve the bytes of
            float32; ``powersgd``, an approximation of rank 1 with error feedback [1]_ from the tenth step on. A
            checkpoint does not have the fed back error: a resumed run begins with zero error.
        find_unused_parameters: True supports models that leave out some parameters in some steps.
        **options: further arguments of Lightning's ``DDPStrategy``, such as a ``ddp_comm_hook`` of the user.

    Raises:
        ConfigError: the compression is unknown; at the start of a training, the processes have different numbers of
            batches.

    References:
        .. [1] Vogels et al., PowerSGD: practical low-rank gradient compression for distributed optimization,
           NeurIPS 2019.
    """

    traits = StrategyTraits(supports_lean_loop=True)
    takes_lean_steps = RenamedAttribute("traits.supports_lean_loop")

    def __init__(self, compression: str = "none", find_unused_parameters: bool = False, **options: Any) -> None:
        if compression not in _COMPRESSIONS:
            hint = nearest(str(compression), _COMPRESSIONS)
            raise ConfigError(f"compression must be one of {', '.join(_COMPRESSIONS)}, got {compression!r}{hint}")
        if compression != "none" and options.get("ddp_comm_hook") is not None:
            raise ConfigError(f"compression={compression} and ddp_comm_hook exclude each other")
        super().__init__(find_unused_parameters=find_unused_parameters, **options)
        self.compression = compression

    def configure_ddp(self) -> None:
        """Wraps the module in torch's ``DistributedDataParallel``, with the hook that compresses gradients."""
        super().configure_ddp()
        self._wrap(self.trained_module)

    def _wrap(self, module: nn.Module) -> None:
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in self._trained)
        self._gradient_count = sum(p.numel() for p in self._trained)
        self.model = self._setup_model(module)
        self._register_ddp_hooks()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Wraps the module anew after a callback has frozen or thawed parameters, which torch's wrapper ignores."""
        if batch_idx == 0 and isinstance(self.model, DistributedDataParallel):
            trained = [p for p in self.trained_module.parameters() if p.requires_grad]
            if len(trained) != len(self._trained) or any(
                a is not b for a, b in zip(trained, self._trained, strict=True)
            ):
                module, self.model = self.model.module, None
                # The old wrapper's hooks at the parameters must go before the new ones come.
                gc.collect()
                self._wrap(module)

    def _register_ddp_hooks(self) -> None:
        if self.compression in _HALF:
            self._ddp_comm_state, self._ddp_comm_hook = _HALF[self.compression], _average_in
        elif self.compression == "powersgd":
            self._ddp_comm_hook = powerSGD_hook.powerSGD_hook
            # One state for each fit: it counts steps, and has a tensor for each bucket of this model.
            self._powersgd_state = powerSGD_hook.PowerSGDState(
                process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=_POWERSGD_START
            )
            self._ddp_comm_state = self._powersgd_state
        assert isinstance(self.model, DistributedDataParallel)
        register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)

    def after_step(self, optimizer: Optimizer) -> None:
        """Counts the step and the bytes of its gradients, which the backward pass has averaged."""
        if isinstance(self.model, DistributedDataParallel):
            self.count_step()
            self.count_bytes(self._reduced_bytes())

    def _reduced_bytes(self) -> float:
        """Returns the number of bytes of gradients that the latest step has all-reduced, after compression."""
        if self.compression in _HALF:
            return 2 * self._gradient_count
        if self.compression == "powersgd" and self._steps_counted > _POWERSGD_START:
            state = self._powersgd_state
            share = state.total_numel_after_compression / max(state.total_numel_before_compression, 1)
            return self._gradient_bytes * share
        return self._gradient_bytes

    def check_work(self, batches: list[float]) -> None:
        """Rejects different numbers of batches: every process takes part in every step.

        Args:
            batches: the number of batches of each process in an epoch; infinite if unknown.

        Raises:
            ConfigError: the numbers differ.
        """
        if len(set(batches)) > 1:
            counts = ", ".join(f"{count:g}" for count in batches)
            raise ConfigError(
                f"the processes have different numbers of batches in an epoch ({counts}), and each step needs all of "
                "them: give them equally many, or use local_sgd or diloco, where one may continue alone"
            )


# torch checks the annotations of hooks, and does not understand strings: this function has none.
def _average_in(dtype, bucket):
    """Averages the gradients in ``bucket`` over all processes in ``dtype``; torch's own hook for bfloat16 needs NCCL.

    Returns:
        A future of the averaged gradients, in the dtype of the bucket.
    """
    gradients = bucket.buffer()
    # Divides first: the sum of many float16 gradients may overflow.
    sent = gradients.to(dtype).div_(dist.get_world_size())
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: gradients.copy_(future.value()[0]))
