"""Strategies for several processes, and for a TPU; to import this registers their names for the Trainer."""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightkit._util.strategy_traits import StrategyTraits
from lightkit.strategies.data_parallel import DataParallel
from lightkit.strategies.diloco import DiLoCo
from lightkit.strategies.local_sgd import LocalSGD
from lightkit.strategies.parameter_server import ParameterServer
from lightkit.strategies.tpu import TorchTPU, TorchTPUAccelerator

__all__ = ["DataParallel", "DiLoCo", "LocalSGD", "ParameterServer", "StrategyTraits", "TorchTPU", "TorchTPUAccelerator"]

# Lightning compares in lower case.
_NAMES = {
    "data_parallel": (DataParallel, {}),
    "data_parallel_fp16": (DataParallel, {"compression": "fp16"}),
    "data_parallel_bf16": (DataParallel, {"compression": "bf16"}),
    "data_parallel_powersgd": (DataParallel, {"compression": "powersgd"}),
    "local_sgd": (LocalSGD, {}),
    "diloco": (DiLoCo, {}),
    "parameter_server": (ParameterServer, {}),
    "parameter_server_async": (ParameterServer, {"mode": "async"}),
    "parameter_server_bounded": (ParameterServer, {"mode": "bounded"}),
    "torch_tpu": (TorchTPU, {}),
}

for _name, (_strategy, _arguments) in _NAMES.items():
    # A reloaded module registers its new classes.
    StrategyRegistry.register(_name, _strategy, _strategy.__doc__.splitlines()[0], override=True, **_arguments)

AcceleratorRegistry.register(
    TorchTPUAccelerator.name(), TorchTPUAccelerator, TorchTPUAccelerator.__doc__.splitlines()[0], override=True
)
