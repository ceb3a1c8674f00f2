"""The quantization of a trained model without a training: the ranges of its inputs come from some samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightkit.compress.error_compensation import InputProducts, compensated
from lightkit.compress.packing import PACKED_KEY
from lightkit.compress.quantization import spec_of
from lightkit.compress.scheme import QuantizationScheme
from lightkit.compress.weight_formats import quantizable_weights
from lightkit.nn.input_quantizer import InputQuantizer

# Weights of so many bits are rounded to the nearest level: their errors do not matter.
_EXACT_BITS = 8


def calibrate(module: nn.Module, scheme: QuantizationScheme, run: Callable[[], object]) -> dict[str, Any]:
    """Measures the ranges of a trained module's inputs, and returns what a checkpoint has of its quantization.

    The module stays as it is; `lightkit.compress.apply_quantization` quantizes it. Weights of 8 bits need no more. With
    less bits the entry has the integers of convolutions and linear layers, which are rounded so that the outputs of a
    layer change least on these samples: see `lightkit.compress.error_compensation`. `lightkit.compress.Quantize` keeps
    more of the accuracy, since it trains the weights.

    Args:
        module: the module with the names that the checkpoint uses, in evaluation mode.
        scheme: the bits.
        run: calls the module with samples of the training data.

    Returns:
        The entry of a checkpoint under `lightkit.compress.QUANTIZATION_KEY`.
    """
    quantizers = {name: InputQuantizer() for name in scheme.rounded_layers(module)}
    formats = scheme.formats(module)
    products = {
        name: InputProducts(layer)  # pyright: ignore[reportArgumentType]
        for name, layer, _ in quantizable_weights(module)
        if formats[name].bits < _EXACT_BITS and InputProducts.are_known(layer)
    }
    observers: list[tuple[nn.Module, InputQuantizer | InputProducts]] = [
        (module.get_submodule(name), quantizer) for name, quantizer in quantizers.items()
    ]
    observers += [(each.layer, each) for each in products.values()]
    handles = [layer.register_forward_pre_hook(_observing(observer.observe)) for layer, observer in observers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for quantizer in quantizers.values():
        quantizer.freeze()
    spec = spec_of(formats, quantizers)
    packed = {
        name: compensated(each.layer.weight, formats[name], each.total)
        for name, each in products.items()
        if each.total is not None
    }
    return {**spec, PACKED_KEY: packed} if packed else spec


def _observing(observe: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Returns a forward pre-hook that calls ``observe`` with the input."""
    return lambda module, arguments: observe(arguments[0])
