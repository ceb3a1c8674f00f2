"""The base class of the data parallel strategies: local signal handling, byte counts, a check of equal work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

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
    """Runs one process for each device, each with the whole model.

    Lightning 2.6 broadcasts before every batch whether process 0 has received a SIGTERM. Here each process handles its
    own SIGTERM: torchrun, SLURM and Kubernetes send it to all processes of a job.

    Args:
        **options: arguments of Lightning's ``DDPStrategy``, such as ``process_group_backend`` (gloo, nccl) and
            ``timeout``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._steps_counted = 0
        self._bytes_sent = 0.0

    @property
    def trained_module(self) -> pl.LightningModule:
        """The module of the running Trainer."""
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def communication(self) -> dict[str, float]:
        """The megabytes that this process has sent to train, and the bytes for each step, by name.

        The dict is empty before the first step. The counts are those of a ring all-reduce: each of ``n`` processes
        sends ``2 (n - 1) / n`` of the reduced bytes.
        """
        if self._steps_counted == 0:
            return {}
        sent = self._bytes_sent
        return {"communication/megabytes": sent / 1e6, "communication/bytes_per_step": sent / self._steps_counted}

    def count_bytes(self, reduced: float) -> None:
        """Counts ``reduced`` bytes of tensors that all processes have all-reduced."""
        self._bytes_sent += reduced * 2 * (self.world_size - 1) / self.world_size

    def count_step(self) -> None:
        """Counts an optimizer step."""
        self._steps_counted += 1

    def configure_ddp(self) -> None:
        """Rejects modules that are sharded or wrapped already.

        Raises:
            ConfigError: a module is sharded or wrapped.
        """
        for name, module in self.trained_module.named_modules():
            wrapped = isinstance(module, DistributedDataParallel) or is_instance(
                module, "torch.distributed.fsdp", "FullyShardedDataParallel"
            )
            if wrapped or any(_is_sharded(parameter) for parameter in module.parameters(recurse=False)):
                raise ConfigError(
                    f"{type(self).__name__} keeps the whole model in every process, but {name or 'the module'} is "
                    "sharded or wrapped already: use one of the two"
                )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **options: Any) -> Any:
        """Steps the optimizer as Lightning's strategy does, and calls `after_step`."""
        output = super().optimizer_step(optimizer, closure, *args, **options)
        self.after_step(optimizer)
        return output

    def after_step(self, optimizer: Optimizer) -> None:
        """Acts after a step of ``optimizer`` in Lightning's loop or in `lightkit.loops`; here it does nothing."""

    def on_train_start(self) -> None:
        """Replaces Lightning's handling of SIGTERM, which it has just set up, and checks the numbers of batches."""
        trainer = self.trained_module.trainer
        if self.world_size > 1:
            _handle_sigterm_locally(trainer)
            self.check_work(_gather_floats(trainer.num_training_batches, self.root_device))

    def check_work(self, batches: list[float]) -> None:
        """Checks the numbers of batches before the training; here it accepts all.

        Args:
            batches: the number of batches of each process in an epoch; infinite if unknown.
        """


def _handle_sigterm_locally(trainer: pl.Trainer) -> None:
    def stop_if_received() -> None:
        if trainer.received_sigterm:
            raise SIGTERMException

    replace_sigterm_check(trainer.fit_loop.epoch_loop, stop_if_received)
    if threading.current_thread() is not threading.main_thread():
        return
    before = original_signal_handlers(trainer).get(signal.SIGTERM)

    def handle(signum: int, frame: FrameType | None) -> None:
        # Lightning's handler broadcasts here, in the middle of another collective.
        set_received_sigterm(trainer)
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        if callable(before):
            cast("Callable[[int, FrameType | None], Any]", before)(signum, frame)

    # Lightning's teardown restores the original handler.
    signal.signal(signal.SIGTERM, handle)


def _gather_floats(value: float, device: torch.device) -> list[float]:
    mine = torch.tensor([float(value)], device=device)
    gathered: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [entry.item() for entry in gathered]


def _is_sharded(parameter: Tensor) -> bool:
    return is_instance(parameter, "torch.distributed.tensor", "DTensor")
