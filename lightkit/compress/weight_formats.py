"""The weights of a module that may have few bits, and the form that each of them has then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# The key of a checkpoint with the bits of weights and the ranges of inputs:
# {"weights": {"model.features.0.weight": [8, 0]}, "inputs": {"model.features.0": [0.0039, 0]}}.
QUANTIZATION_KEY = "lightkit_quantization"

# The bits that weights may have.
BITS = (2, 3, 4, 8)


def largest_level(bits: int) -> int:
    """Returns the largest level of a weight of some bits: levels are ``-qmax ... qmax``, and of 2 bits -3, -1, 1, 3.

    Raises:
        ValueError: weights cannot have so many bits.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    return 3 if bits == 2 else 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class WeightFormat:
    """The bits of a weight.

    Args:
        bits: the bits of a value.
        group_size: the number of values along a row that share a scale; 0 gives each row, an output of the layer, one
            scale.
    """

    bits: int
    group_size: int = 0

    def rows(self, weight: Tensor) -> Tensor:
        """Returns a view of a contiguous weight in which each row has one scale."""
        return weight.view(-1, self.group_size) if self.group_size else weight.view(len(weight), -1)


def quantizable_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yields the weights that may have few bits, each once: of convolutions, linear, recurrent and embedding layers.

    Yields:
        The name within ``module``, the layer, and the weight.
    """
    seen: set[nn.Parameter] = set()
    for name, layer, parameter in _weights(module):
        if parameter not in seen:
            seen.add(parameter)
            yield name, layer, parameter


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yields as `quantizable_weights` does; a weight of several layers comes with each of them."""
    for prefix, layer in module.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            if _is_weight(layer, own, parameter):
                yield (f"{prefix}.{own}" if prefix else own), layer, parameter


def _is_weight(layer: nn.Module, own: str, parameter: nn.Parameter) -> bool:
    if parameter.dim() < 2 or not parameter.is_floating_point() or parameter.numel() == 0:
        return False
    if isinstance(layer, nn.RNNBase):
        return own.startswith("weight")
    if isinstance(layer, nn.MultiheadAttention):
        return own.endswith("proj_weight")
    if isinstance(layer, _ConvTransposeNd):
        # A row of its weight belongs to an input, whose products have no common scale.
        return False
    return own == "weight" and isinstance(layer, (_ConvNd, nn.Linear, nn.Embedding, nn.EmbeddingBag))


def takes_quantizer(layer: nn.Module) -> bool:
    """Returns True for a layer whose input may be rounded: a convolution or a linear layer."""
    return isinstance(layer, (_ConvNd, nn.Linear)) and not isinstance(layer, _ConvTransposeNd)


def choose_formats(
    module: nn.Module, bits: int, group_size: int, edge_bits: int, exceptions: Mapping[str, int]
) -> dict[str, WeightFormat]:
    """Returns the format of each weight of a module, by name.

    Args:
        module: the module.
        bits: the bits of most weights.
        group_size: the number of values that share a scale in linear layers whose rows are a multiple of it; 0 gives
            each row a scale.
        edge_bits: the least bits of the first and the last weight, which the model is most sensitive to.
        exceptions: the bits of some weights, by name.
    """
    # The head of a language model may have the weight of its embedding.
    parameters = [parameter for _, _, parameter in _weights(module)]
    edges = {parameters[0], parameters[-1]} if parameters else set()
    formats: dict[str, WeightFormat] = {}
    for name, layer, weight in quantizable_weights(module):
        usual = max(bits, edge_bits) if weight in edges else bits
        grouped = group_size > 0 and isinstance(layer, nn.Linear) and weight.shape[1] % group_size == 0
        formats[name] = WeightFormat(exceptions.get(name, usual), group_size if grouped else 0)
    return formats
