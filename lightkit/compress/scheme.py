"""How a model is quantized: the bits of its weights, and which layers' inputs are rounded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightkit.compress.weight_formats import BITS, WeightFormat, choose_formats, takes_quantizer
from lightkit.errors import ConfigError

_ACTIVATIONS = ("auto", "int8", "float")

# The values of a row that share a scale, for few bits without rounded inputs: a usual size, which costs 1 bit a value.
_GROUP_SIZE = 32


@dataclass(frozen=True)
class QuantizationScheme:
    """The bits of a model's weights and of its layers' inputs.

    Args:
        bits: the bits of a weight: 8, 4, 3 or 2.
        activations: ``"int8"`` rounds inputs of layers, ``"float"`` leaves them; ``"auto"`` rounds them if the module
            has convolutions. The weights of recurrent and embedding layers are rounded, their inputs never.
        edge_bits: the least bits of the first and the last weight, which the model is most sensitive to.
        group_size: the number of values of a linear layer's row that share a scale, in rows that are a multiple of it;
            0 gives each row one scale, and None takes 32 for less than 8 bits without rounded inputs, else 0.

    Raises:
        ConfigError: an argument is none of these.
    """

    bits: int = 8
    activations: str = "auto"
    edge_bits: int = 8
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in {"bits": self.bits, "edge_bits": self.edge_bits}.items():
            if type(value) is not int or value not in BITS:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, BITS))}, got {value!r}")
        if self.activations not in _ACTIVATIONS:
            raise ConfigError(f"activations must be one of {', '.join(_ACTIVATIONS)}, got {self.activations!r}")
        size = self.group_size
        if size is not None and (type(size) is not int or size < 0):
            raise ConfigError(f"group_size must be null or a whole number, at least 0, got {size!r}")

    def formats(self, module: nn.Module) -> dict[str, WeightFormat]:
        """Returns the format of each weight of a module, by name."""
        size = self.group_size
        if size is None:
            size = 0 if self.bits == 8 or self.rounds_inputs(module) else _GROUP_SIZE
        return choose_formats(module, self.bits, size, self.edge_bits)

    def rounded_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """Returns the layers of a module whose inputs are rounded, by name."""
        if not self.rounds_inputs(module):
            return {}
        return {name: layer for name, layer in module.named_modules() if takes_quantizer(layer)}

    def rounds_inputs(self, module: nn.Module) -> bool:
        """Returns True if the inputs of a module's layers are rounded."""
        if self.activations == "auto":
            return any(isinstance(layer, _ConvNd) for layer in module.modules())
        return self.activations == "int8"
