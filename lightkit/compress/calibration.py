"""The quantization of a trained model without a training: the ranges of its inputs come from some samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightkit.compress.error_compensation import InputProducts, compensated
from lightkit.compress.packing import PACKED_KEY, packed_entry
from lightkit.compress.quantization import spec_of
from lightkit.compress.scheme import QuantizationScheme
from lightkit.compress.weight_formats import WeightFormat, quantizable_weights
from lightkit.nn.input_quantizer import InputQuantizer
from lightkit.ops.fake_quantize import fake_quantize_weights

# Weights of so many bits are rounded to the nearest level: their errors do not matter.
_EXACT_BITS = 8


class Calibration:
    """Measures the inputs of a trained module's layers on samples: their ranges, and their products with each other.

    Args:
        module: the module, in evaluation mode, which stays as it is.
        scheme: decides which layers' inputs are rounded.
        run: calls the module with samples of the training data.
        bits: the smallest number of bits that weights will get; with 8 there is no need for products.
    """

    def __init__(self, module: nn.Module, scheme: QuantizationScheme, run: Callable[[], object], bits: int) -> None:
        self._weights = {name: weight for name, _, weight in quantizable_weights(module)}
        self._quantizers = {name: InputQuantizer() for name in scheme.rounded_layers(module)}
        self._products = {
            name: InputProducts(layer)  # pyright: ignore[reportArgumentType]
            for name, layer, _ in quantizable_weights(module)
            if bits < _EXACT_BITS and InputProducts.are_known(layer)
        }
        observers: list[tuple[nn.Module, InputQuantizer | InputProducts]] = [
            (module.get_submodule(name), quantizer) for name, quantizer in self._quantizers.items()
        ]
        observers += [(each.layer, each) for each in self._products.values()]
        handles = [layer.register_forward_pre_hook(_observing(observer.observe)) for layer, observer in observers]
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        for quantizer in self._quantizers.values():
            quantizer.freeze()

    def levels(self, name: str, weight_format: WeightFormat) -> tuple[Tensor, Tensor]:
        """Returns the integer levels of a weight, int8 of its shape, and the scales of its rows, float32.

        Below 8 bits the levels of convolutions and linear layers are those that change the outputs of the layer least
        on the samples: see `lightkit.compress.error_compensation`.

        Args:
            name: the name of the weight.
            weight_format: its bits.
        """
        products = self._products.get(name)
        if weight_format.bits < _EXACT_BITS and products is not None and products.total is not None:
            return compensated(self._weights[name], weight_format, products.total)
        source = self._weights[name].detach().float().contiguous()
        rows = weight_format.rows(source)
        rounded = torch.empty_like(rows)
        (scales,) = fake_quantize_weights([rows], [rounded], weight_format.bits)
        return (rounded / scales[:, None]).round().to(torch.int8).view(source.shape), scales

    def spec(self, formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
        """Returns the entry of a checkpoint under `lightkit.compress.QUANTIZATION_KEY`.

        Args:
            formats: the format of each weight, by name.
        """
        spec = spec_of(formats, self._quantizers)
        packed = {
            name: packed_entry(*self.levels(name, formats[name]), formats[name].bits)
            for name, products in self._products.items()
            if products.total is not None and formats[name].bits < _EXACT_BITS
        }
        return {**spec, PACKED_KEY: packed} if packed else spec


def calibrate(module: nn.Module, scheme: QuantizationScheme, run: Callable[[], object]) -> dict[str, Any]:
    """Measures the ranges of a trained module's inputs, and returns what a checkpoint has of its quantization.

    The module stays as it is; `lightkit.compress.apply_quantization` quantizes it. Weights of 8 bits need no more. With
    fewer bits the entry also has the integers of convolutions and linear layers, which are rounded so that the outputs
    of a layer change least on these samples: see `lightkit.compress.error_compensation`. `lightkit.compress.Quantize`
    keeps more of the accuracy, since it trains the weights.

    Args:
        module: the module with the names that the checkpoint uses, in evaluation mode.
        scheme: the bits.
        run: calls the module with samples of the training data.

    Returns:
        The entry of a checkpoint under `lightkit.compress.QUANTIZATION_KEY`.
    """
    return Calibration(module, scheme, run, scheme.least_bits).spec(scheme.formats(module))


def _observing(observe: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Returns a forward pre-hook that calls ``observe`` with the input."""
    return lambda module, arguments: observe(arguments[0])
