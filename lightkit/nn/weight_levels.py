"""The integer levels of a layer's rounded weights, from which a chain of int8 layers is made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# The attribute of a layer with its levels. It is in no state dict; copies and pickles of the layer have it.
_ATTRIBUTE = "_lightkit_weight_levels"


@dataclass(frozen=True)
class WeightLevels:
    """The weight of a layer as integers: ``levels * scales`` is the weight.

    Args:
        levels: int8, of the weight's shape.
        scales: float32, one positive scale for each output of the layer, or for each of the equal parts of its row.
        version: torch's count of changes of the weight when it had these levels.
    """

    levels: Tensor
    scales: Tensor
    version: int

    def weight(self) -> Tensor:
        """Returns the weight, float32 of its shape."""
        return (self.levels.reshape(len(self.scales), -1) * self.scales[:, None]).view(self.levels.shape)


def set_levels(layer: nn.Module, levels: Tensor, scales: Tensor) -> None:
    """Gives a layer the levels of its present weight, which hold until the weight changes."""
    vars(layer)[_ATTRIBUTE] = WeightLevels(levels, scales, layer.weight._version)  # pyright: ignore


def levels_of(layer: nn.Module) -> WeightLevels | None:
    """Returns the levels of a layer's weight; None if it has none, or has changed since."""
    found = vars(layer).get(_ATTRIBUTE)
    weight = layer._parameters.get("weight")
    if found is None or weight is None:
        return None
    if found.version != weight._version:
        # A copy of the layer counts its changes anew.
        if found.levels.shape != weight.shape or not torch.equal(found.weight(), weight.detach().float()):
            del vars(layer)[_ATTRIBUTE]
            return None
        found = vars(layer)[_ATTRIBUTE] = replace(found, version=weight._version)
    return found
