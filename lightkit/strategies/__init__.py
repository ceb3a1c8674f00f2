"""Strategies for several processes and for a TPU. An import of this package registers their names for the Trainer."""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightkit._util.strategy_traits import StrategyTraits
from lightkit.strategies.data_parallel import DataParallel
from lightkit.strategies.diloco import DiLoCo
from lightkit.strategies.local_sgd import LocalSGD
from lightkit.strategies.parameter_server import ParameterServer
from lightkit.strategies.tpu import TorchTPU, TorchTPUAccelerator

__all__ = ["DataParallel", "DiLoCo", "LocalSGD", "ParameterServer", "StrategyTraits", "TorchTPU", "TorchTPUAccelerator"]

# Lightning compares names in lower case.
_NAMES: dict[str, tuple[type[Strategy], dict[str, str]]] = {
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


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


for _name, (_strategy, _arguments) in _NAMES.items():
    # override: a reloaded module registers its new classes.
    StrategyRegistry.register(_name, _strategy, _summary(_strategy), override=True, **_arguments)

AcceleratorRegistry.register(
    TorchTPUAccelerator.name(), TorchTPUAccelerator, _summary(TorchTPUAccelerator), override=True
)
