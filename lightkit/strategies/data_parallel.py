"""Data parallel training whose gradients may be compressed on their way, on CPUs too."""

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

# PowerSGD starts from gradients that have settled a little; until then they are sent whole.
_POWERSGD_START = 10


class DataParallel(Parallel):
    """Each process takes its part of every batch; gradients are averaged in every step.

    Lightning's ``DDPStrategy``, with communication hooks on every device (Lightning leaves them out where there is
    no CUDA) and without its broadcast before each batch.

    Args:
        compression: of gradients on their way: ``none``; ``fp16`` and ``bf16``, half the bytes; ``powersgd``, their
            approximation of rank 1 with error feedback [1]_ from the tenth step on. The error that is fed back is not
            part of a checkpoint: a resumed run begins with none.
        find_unused_parameters: for models that leave out some parameters in some steps.
        **options: of Lightning's ``DDPStrategy``, a ``ddp_comm_hook`` of one's own among them.

    Raises:
        ConfigError: an unknown compression; at the start of a training, processes with different numbers of batches.

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
        """Wraps the module."""
        super().configure_ddp()
        self._wrap(self.model)

    def _wrap(self, module: nn.Module) -> None:
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in self._trained)
        self._gradient_count = sum(p.numel() for p in self._trained)
        self.model = self._setup_model(module)
        self._register_ddp_hooks()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Between epochs somebody may have frozen parameters or thawed some, which torch's wrapper does not notice."""
        if batch_idx == 0 and isinstance(self.model, DistributedDataParallel):
            trained = [p for p in self.lightning_module.parameters() if p.requires_grad]
            if len(trained) != len(self._trained) or any(
                a is not b for a, b in zip(trained, self._trained, strict=True)
            ):
                module, self.model = self.model.module, None
                # Its hooks at the parameters must be gone before there are others.
                gc.collect()
                self._wrap(module)

    def _register_ddp_hooks(self) -> None:
        if self.compression in _HALF:
            self._ddp_comm_state, self._ddp_comm_hook = _HALF[self.compression], _average_in
        elif self.compression == "powersgd":
            self._ddp_comm_hook = powerSGD_hook.powerSGD_hook
            # Anew for each fit: the state counts steps, and keeps a tensor for each bucket of this model.
            self._ddp_comm_state = powerSGD_hook.PowerSGDState(
                process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=_POWERSGD_START
            )
        register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)

    def after_step(self, optimizer: Optimizer) -> None:
        """Counts it; its gradients were averaged in the backward pass."""
        if isinstance(self.model, DistributedDataParallel):
            self.count_step()
            self.count_bytes(self._reduced_bytes())

    def _reduced_bytes(self) -> float:
        """Bytes of gradients in the step just taken, as they were sent."""
        if self.compression in _HALF:
            return 2 * self._gradient_count
        if self.compression == "powersgd" and self._steps_counted > _POWERSGD_START:
            state = self._ddp_comm_state
            share = state.total_numel_after_compression / max(state.total_numel_before_compression, 1)
            return self._gradient_bytes * share
        return self._gradient_bytes

    def check_work(self, batches: list[float]) -> None:
        """Every process must take part in every step."""
        if len(set(batches)) > 1:
            counts = ", ".join(f"{count:g}" for count in batches)
            raise ConfigError(
                f"the processes have different numbers of batches in an epoch ({counts}), and each step needs all of "
                "them: give them equally many, or use local_sgd or diloco, where one may go on alone"
            )


# Without annotations: torch looks at them, and does not know them as strings.
def _average_in(dtype, bucket):
    """A communication hook: averages gradients in another dtype. torch's own for bfloat16 is for NCCL alone."""
    gradients = bucket.buffer()
    # Divided first: the sum of many would leave the range of float16.
    sent = gradients.to(dtype).div_(dist.get_world_size())
    done = dist.all_reduce(sent, async_op=True).get_future()
    return done.then(lambda future: gradients.copy_(future.value()[0]))
