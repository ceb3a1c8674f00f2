"""Strategy and accelerator for a TPU by the package torch_tpu, and the choice of the package. Not run on hardware.

Lightning 2.6 supports TPUs by torch_xla. Its successor torch_tpu, a beta in version 0.2, registers a TPU as the device
``tpu`` of torch (PrivateUse1). This module relies on three properties of torch_tpu: an import of torch or torch_tpu
registers the device, `torch.accelerator` returns the device, and the device belongs to one process.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightkit._util.deprecated import RenamedAttribute
from lightkit._util.strategy_traits import StrategyTraits
from lightkit.checkpoints import to_cpu
from lightkit.errors import ConfigError

_DEVICE = "tpu"


def unavailable_reason() -> str | None:
    """Returns the reason why torch_tpu has no TPU on this machine; None if it has one."""
    if find_spec("torch_tpu") is None:
        return "the package torch_tpu is not installed: pip install torch_tpu"
    try:
        importlib.import_module("torch_tpu")
    except ImportError as error:
        return f"torch_tpu cannot be imported: {error}"
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is not None and device.type == _DEVICE else "torch_tpu finds no TPU on this machine"


class TorchTPUAccelerator(Accelerator):
    """A TPU by torch_tpu: ``Trainer(accelerator="torch_tpu", strategy="torch_tpu")``. Not run on hardware."""

    def setup_device(self, device: torch.device) -> None:
        """Checks that ``device`` is a TPU; a process has one TPU, so that there is none to choose.

        Raises:
            ConfigError: the device is no TPU.
        """
        if device.type != _DEVICE:
            raise ConfigError(f"the accelerator torch_tpu goes with the strategy torch_tpu, not with one on {device}")

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Returns no statistics: torch_tpu has no stable interface for them."""
        return {}

    def teardown(self) -> None:
        """Does nothing."""

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        """Returns the number of devices, which must be 1.

        Args:
            devices: the Trainer's argument: 1 or ``"1"``.

        Raises:
            ConfigError: ``devices`` is another number, another string, or a list.
        """
        if devices not in (1, "1"):
            raise ConfigError(f"devices={devices}: torch_tpu gives a process one TPU; several are not supported yet")
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """Returns a list with the one TPU of this process.

        Args:
            devices: the number of devices, which `parse_devices` has checked to be 1.
        """
        return [torch.device(_DEVICE)]

    @staticmethod
    def auto_device_count() -> int:
        """Returns 1 if torch_tpu finds a TPU, else 0."""
        return int(unavailable_reason() is None)

    @staticmethod
    def is_available() -> bool:
        """Returns True if torch_tpu is installed and finds a TPU."""
        return unavailable_reason() is None

    @staticmethod
    def name() -> str:
        """Returns the name by which a Trainer finds this accelerator."""
        return "torch_tpu"


class TorchTPU(SingleDeviceStrategy):
    """Runs one process on one TPU, by torch_tpu. Not run on hardware.

    Checkpoints have CPU tensors, and load on any machine. ``bf16-mixed`` autocasts on the TPU.

    Args:
        accelerator: the accelerator; the Trainer sets all three arguments.
        checkpoint_io: the plug-in that writes checkpoints.
        precision_plugin: the plug-in that sets the precision.

    Raises:
        ConfigError: torch_tpu finds no TPU, or the precision is ``16-mixed``.
    """

    strategy_name = "torch_tpu"
    traits = StrategyTraits(supports_lean_loop=True)
    takes_lean_steps = RenamedAttribute("traits.supports_lean_loop")

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if (reason := unavailable_reason()) is not None:
            raise ConfigError(reason)
        super().__init__(_DEVICE, accelerator, checkpoint_io, precision_plugin)

    @property
    def precision_plugin(self) -> Precision:
        """The precision plug-in, which autocasts on the TPU: Lightning's choice would autocast on a GPU."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        plugin = precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.device != _DEVICE:
            if plugin.scaler is not None:
                raise ConfigError("precision 16-mixed needs a GradScaler, which a TPU has none of; use bf16-mixed")
            # The precision is bf16-mixed: 16-mixed has a scaler.
            plugin = MixedPrecision("bf16-mixed", _DEVICE)
        self._precision_plugin = plugin

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint with CPU tensors."""
        super().save_checkpoint(to_cpu(checkpoint), filepath, storage_options)


def choose() -> dict[str, Any]:
    """Returns the arguments ``accelerator`` and ``strategy`` of a Trainer for one TPU, by the installed package.

    torch_xla comes before torch_tpu.

    Raises:
        ConfigError: neither package is installed, or torch_tpu finds no TPU.
    """
    if find_spec("torch_xla") is not None:
        # Lightning cannot build its strategy for one TPU by name, and builds it for "auto".
        return {"accelerator": _DEVICE, "strategy": "auto"}
    if find_spec("torch_tpu") is not None:
        return {"accelerator": TorchTPUAccelerator.name(), "strategy": TorchTPU()}
    raise ConfigError(
        "accelerator=tpu needs the package torch_tpu (pip install torch_tpu) or, with a torch of the same version, "
        "torch_xla (pip install 'torch_xla[tpu]'), and neither is installed"
    )
