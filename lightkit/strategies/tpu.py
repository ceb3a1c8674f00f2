"""Training on a TPU by the package torch_tpu, and which package there is for TPUs at all. Not run on hardware.

Lightning 2.6 knows TPUs by torch_xla. Its successor torch_tpu, a beta in version 0.2, makes a TPU the device ``tpu`` of
torch itself, in the place that torch keeps for devices of others (PrivateUse1). The device is registered when torch or
torch_tpu is imported, is then what `torch.accelerator` stands for, and belongs to one process. Nothing else of it is
relied upon here.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightkit._util.deprecated import RenamedAttribute
from lightkit._util.strategy_traits import StrategyTraits
from lightkit.checkpoints import on_cpu
from lightkit.errors import ConfigError

_DEVICE = "tpu"


def missing() -> str | None:
    """Why torch_tpu has no TPU here, or None where it has."""
    if find_spec("torch_tpu") is None:
        return "the package torch_tpu is not installed: pip install torch_tpu"
    try:
        importlib.import_module("torch_tpu")
    except ImportError as error:
        return f"torch_tpu cannot be imported: {error}"
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is not None and device.type == _DEVICE else "torch_tpu finds no TPU on this machine"


class TorchTPUAccelerator(Accelerator):
    """The TPU of torch_tpu: ``Trainer(accelerator="torch_tpu", strategy="torch_tpu")``. Not run on hardware."""

    def setup_device(self, device: torch.device) -> None:
        """Checks that it is one; a process need not choose, as it has no other.

        Raises:
            ConfigError: it is not.
        """
        if device.type != _DEVICE:
            raise ConfigError(f"the accelerator torch_tpu goes with the strategy torch_tpu, not with one on {device}")

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Nothing: what torch_tpu tells of its memory is not settled yet."""
        return {}

    def teardown(self) -> None:
        """Leaves nothing to do."""

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        """How many, which must be one.

        Raises:
            ConfigError: it is another number, or a list of certain ones.
        """
        if devices not in (1, "1"):
            raise ConfigError(f"devices={devices}: torch_tpu gives a process one TPU; several are not supported yet")
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """The process's own."""
        return [torch.device(_DEVICE)]

    @staticmethod
    def auto_device_count() -> int:
        """One, if there is any."""
        return int(missing() is None)

    @staticmethod
    def is_available() -> bool:
        """Whether torch_tpu is installed and finds a TPU."""
        return missing() is None

    @staticmethod
    def name() -> str:
        """What it is registered as."""
        return "torch_tpu"


class TorchTPU(SingleDeviceStrategy):
    """One process on one TPU, by torch_tpu. Not run on hardware.

    Checkpoints hold tensors of the CPU, and load anywhere. ``bf16-mixed`` is autocast of the TPU.

    Args:
        accelerator: set by the Trainer, as the rest.
        checkpoint_io: writes the checkpoints.
        precision_plugin: decides on the numbers.

    Raises:
        ConfigError: there is no TPU, or precision is ``16-mixed``.
    """

    strategy_name = "torch_tpu"
    traits = StrategyTraits(supports_lean_loop=True)
    takes_lean_steps = RenamedAttribute("traits.supports_lean_loop")

    def __init__(
        self,
        accelerator: pl.accelerators.Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if (cause := missing()) is not None:
            raise ConfigError(cause)
        super().__init__(_DEVICE, accelerator, checkpoint_io, precision_plugin)

    @property
    def precision_plugin(self) -> Precision:
        """The plug-in, which autocasts on the TPU: Lightning's own choice is for a GPU wherever it is not a CPU."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision) and plugin.device != _DEVICE:
            if plugin.scaler is not None:
                raise ConfigError("precision 16-mixed needs a GradScaler, which a TPU has none of; use bf16-mixed")
            plugin = MixedPrecision(plugin.precision, _DEVICE)
        self._precision_plugin = plugin

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint that needs no TPU to be read."""
        super().save_checkpoint(on_cpu(checkpoint), filepath, storage_options)


def choose() -> dict[str, Any]:
    """The arguments ``accelerator`` and ``strategy`` of a Trainer for one TPU, by the package that is installed.

    That is Lightning's own for torch_xla, if both are.

    Raises:
        ConfigError: neither is, or torch_tpu is and finds no TPU.
    """
    if find_spec("torch_xla") is not None:
        # By name Lightning cannot build its own strategy; what it chooses, it can.
        return {"accelerator": _DEVICE, "strategy": "auto"}
    if find_spec("torch_tpu") is not None:
        return {"accelerator": TorchTPUAccelerator.name(), "strategy": TorchTPU()}
    raise ConfigError(
        "accelerator=tpu needs the package torch_tpu (pip install torch_tpu) or, with a torch of the same version, "
        "torch_xla (pip install 'torch_xla[tpu]'), and neither is installed"
    )
