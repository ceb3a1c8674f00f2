"""The quantization of a trained model without a training: the ranges of its inputs come from some samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightkit.compress.quantization import spec_of
from lightkit.compress.scheme import QuantizationScheme
from lightkit.nn.input_quantizer import InputQuantizer


def calibrate(module: nn.Module, scheme: QuantizationScheme, run: Callable[[], object]) -> dict[str, Any]:
    """Measures the ranges of a trained module's inputs, and returns what a checkpoint has of its quantization.

    The module stays as it is; `lightkit.compress.apply_quantization` quantizes it. Weights of 8 bits need no more;
    with less bits, `lightkit.compress.Quantize` keeps more of the accuracy, since it trains them.

    Args:
        module: the module with the names that the checkpoint uses, in evaluation mode.
        scheme: the bits.
        run: calls the module with samples of the training data.

    Returns:
        The entry of a checkpoint under `lightkit.compress.QUANTIZATION_KEY`.
    """
    quantizers = {name: InputQuantizer() for name in scheme.rounded_layers(module)}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, quantizer=quantizer: quantizer.observe(arguments[0])
        )
        for name, quantizer in quantizers.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for quantizer in quantizers.values():
        quantizer.freeze()
    return spec_of(scheme.formats(module), quantizers)
