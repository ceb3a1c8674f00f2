"""What the strategies here share: no collective for signals in every step, counted bytes, equal work checked."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightkit._lightning.loops import original_signal_handlers, replace_sigterm_check, set_received_sigterm
from lightkit._util.imported import is_instance
from lightkit.errors import ConfigError


class Parallel(DDPStrategy):
    """One process a device, each with the whole model.

    Lightning 2.6 asks before every batch, by a broadcast, whether process 0 was sent a SIGTERM. Here each process
    listens for its own: whoever ends a job (torchrun, SLURM, Kubernetes) tells all of them.

    Args:
        **options: of Lightning's ``DDPStrategy``, such as ``process_group_backend`` (gloo, nccl) and ``timeout``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._steps_counted = 0
        self._bytes_sent = 0.0

    @property
    def communication(self) -> dict[str, float]:
        """What this process sent to train: ``communication/megabytes`` in all, and ``communication/bytes_per_step``.

        As a ring sends it: of ``n`` processes each sends ``2 (n - 1) / n`` of the bytes that are reduced. Empty
        before the first step.
        """
        if self._steps_counted == 0:
            return {}
        sent = self._bytes_sent
        return {"communication/megabytes": sent / 1e6, "communication/bytes_per_step": sent / self._steps_counted}

    def count_bytes(self, reduced: float) -> None:
        """Counts the bytes of tensors that were reduced over all processes."""
        self._bytes_sent += reduced * 2 * (self.world_size - 1) / self.world_size

    def count_step(self) -> None:
        """Counts a step of the optimizer."""
        self._steps_counted += 1

    def configure_ddp(self) -> None:
        """Refuses modules that are spread over processes by themselves."""
        for name, module in self.lightning_module.named_modules():
            wrapped = isinstance(module, DistributedDataParallel) or is_instance(
                module, "torch.distributed.fsdp", "FullyShardedDataParallel"
            )
            if wrapped or any(_is_sharded(parameter) for parameter in module.parameters(recurse=False)):
                raise ConfigError(
                    f"{type(self).__name__} keeps the whole model in every process, but {name or 'the module'} is "
                    "sharded or wrapped already: use one of the two"
                )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **options: Any) -> Any:
        """A step, and what belongs to it."""
        output = super().optimizer_step(optimizer, closure, *args, **options)
        self.after_step(optimizer)
        return output

    def after_step(self, optimizer: Optimizer) -> None:
        """What follows a step of an optimizer, whoever has called that."""

    def on_train_start(self) -> None:
        """Puts the process's own listening in place of Lightning's; the handlers of signals are set just before."""
        trainer = self.lightning_module.trainer
        if self.world_size > 1:
            _listen_alone(trainer)
            self.check_work(_gather_numbers(trainer.num_training_batches, self.root_device))

    def check_work(self, batches: list[float]) -> None:
        """Looks at how many batches each process has in an epoch; infinite where that is not known."""


def _listen_alone(trainer: pl.Trainer) -> None:

    def stop_if_told() -> None:
        if trainer.received_sigterm:
            raise SIGTERMException

    replace_sigterm_check(trainer.fit_loop.epoch_loop, stop_if_told)
    if threading.current_thread() is not threading.main_thread():
        return
    before = original_signal_handlers(trainer).get(signal.SIGTERM)

    def note(signum: int, frame: FrameType | None) -> None:
        # Lightning's own broadcasts from here, in the middle of whatever else is being sent.
        set_received_sigterm(trainer)
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        if callable(before):
            before(signum, frame)

    # Lightning's teardown brings back what there was before.
    signal.signal(signal.SIGTERM, note)


def _gather_numbers(value: float, device: torch.device) -> list[float]:
    mine = torch.tensor([float(value)], device=device)
    everyone: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [number.item() for number in everyone]


def _is_sharded(parameter: Tensor) -> bool:
    return is_instance(parameter, "torch.distributed.tensor", "DTensor")
