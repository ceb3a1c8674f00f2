"""How a model is quantized: the bits of its weights, and which layers' inputs are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightkit.compress.weight_formats import BITS, WeightFormat, choose_formats, quantizable_weights, takes_quantizer
from lightkit.errors import ConfigError
from lightkit.finetune.patterns import common_prefix, match

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
        layers: the bits of some weights, by patterns of names as in `lightkit.finetune.patterns.match`, such as
            ``{"features.3": 4}``; the last pattern that matches decides, before ``edge_bits``. None for no exceptions.

    Raises:
        ConfigError: an argument is out of its range; the message names it.
    """

    bits: int = 8
    activations: str = "auto"
    edge_bits: int = 8
    group_size: int | None = None
    layers: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for name, value in {"bits": self.bits, "edge_bits": self.edge_bits}.items():
            if type(value) is not int or value not in BITS:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, BITS))}, got {value!r}")
        if self.activations not in _ACTIVATIONS:
            raise ConfigError(f"activations must be one of {', '.join(_ACTIVATIONS)}, got {self.activations!r}")
        size = self.group_size
        if size is not None and (type(size) is not int or size < 0):
            raise ConfigError(f"group_size must be null or a whole number, at least 0, got {size!r}")
        if self.layers is not None and not isinstance(self.layers, Mapping):
            raise ConfigError(
                f"layers must have bits by patterns of names, as in {{features.3: 4}}, got {self.layers!r}"
            )
        for pattern, bits in (self.layers or {}).items():
            if not isinstance(pattern, str) or type(bits) is not int or bits not in BITS:
                allowed = ", ".join(map(str, BITS))
                raise ConfigError(f"layers must have one of {allowed} for each pattern, got {pattern!r}: {bits!r}")

    @property
    def least_bits(self) -> int:
        """The smallest number of bits that a weight may get."""
        return min([self.bits, *(self.layers or {}).values()])

    def formats(self, module: nn.Module) -> dict[str, WeightFormat]:
        """Returns the format of each weight of a module, by name.

        Raises:
            ConfigError: a pattern of ``layers`` matches no weight.
        """
        size = self.group_size
        if size is None:
            size = 0 if self.least_bits == 8 or self.rounds_inputs(module) else _GROUP_SIZE
        names = [name for name, _, _ in quantizable_weights(module)]
        prefix = common_prefix(names)
        exceptions: dict[str, int] = {}
        for pattern, bits in (self.layers or {}).items():
            exceptions.update(dict.fromkeys(match([pattern], names, "layers", prefix), bits))
        return choose_formats(module, self.bits, size, self.edge_bits, exceptions)

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
