"""The rounding of a layer's input to 8 bits, in training and in evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightkit.ops.layer_chain import MAX_LEVEL

# The smallest scale: its inverse is finite in float32.
MIN_SCALE = 2.0**-120


class InputQuantizer:
    """Rounds the input of a layer to the levels of 8 bits: a forward pre-hook, see `attach`.

    The value of the level q, from 0 to 255, is ``(q - zero_point) * scale``. The input x has the level nearest to
    ``x / scale + zero_point``, ties to even, within the range; the gradient flows to inputs within the range alone
    (the straight-through estimator [1]_). `torch.fake_quantize_per_tensor_affine` computes it, with the same parameters
    in training and in deployment.

    A quantizer without a scale changes nothing. While ``is_observing`` is set, a quantizer of a layer in training mode
    records the extremes of each batch, and `freeze` makes the range of their means. Evaluation never records.

    Attributes:
        scale: the distance of two levels, a positive float32 number; None before the first range.
        zero_point: the level of 0.
        is_observing: True records the extremes of the inputs.
        lows: the sum of the smallest values of the observed batches.
        highs: the sum of their largest values.
        batches: the number of the observed batches.

    References:
        .. [1] Bengio, Léonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons for
           Conditional Computation, 2013.
    """

    def __init__(self, scale: float | None = None, zero_point: int = 0) -> None:
        self.scale, self.zero_point = scale, zero_point
        self.is_observing = False
        self.lows = self.highs = 0.0
        self.batches = 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Returns the arguments of a layer with its input rounded; None leaves them as they are."""
        if not arguments or not isinstance(arguments[0], Tensor) or not arguments[0].is_floating_point():
            return None
        input, *others = arguments
        if self.is_observing and module.training and torch.is_grad_enabled():
            self.observe(input)
        return None if self.scale is None else (self.round(input), *others)

    def observe(self, input: Tensor) -> None:
        """Records the extremes of a batch, unless it has infinite values or NaN."""
        if input.numel() > 0:
            low, high = torch.stack(input.detach().aminmax()).tolist()
            if math.isfinite(low) and math.isfinite(high):
                self.lows, self.highs, self.batches = self.lows + low, self.highs + high, self.batches + 1

    def round(self, input: Tensor) -> Tensor:
        """Returns ``input`` rounded to the levels, in its dtype and shape."""
        assert self.scale is not None
        if torch.compiler.is_exporting():
            # torch.export does not know torch's own function.
            levels = (input * (1 / torch.tensor(self.scale)).item()).round() + self.zero_point
            return (levels.clamp(0, MAX_LEVEL) - self.zero_point) * self.scale
        return torch.fake_quantize_per_tensor_affine(input, self.scale, self.zero_point, 0, MAX_LEVEL)

    def freeze(self) -> None:
        """Sets the range to the means of the observed extremes, and forgets them; without any the range stays."""
        if self.batches > 0:
            self.scale, self.zero_point = affine(self.lows / self.batches, self.highs / self.batches)
        self.is_observing, self.lows, self.highs, self.batches = False, 0.0, 0.0, 0


def affine(low: float, high: float) -> tuple[float, int]:
    """Returns the scale and the zero point of the smallest range of 256 levels that has 0 and two values.

    Args:
        low: the smallest value; of inputs from 0 up the zero point is 0.
        high: the largest value.

    Returns:
        The scale as a float32 number, and the zero point from 0 to 255.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor(max((high - low) / MAX_LEVEL, MIN_SCALE), dtype=torch.float32))
    return scale, min(max(round(-low / scale), 0), MAX_LEVEL)


def attach(layer: nn.Module, quantizer: InputQuantizer) -> None:
    """Rounds the inputs of a layer from now on; a quantizer that the layer has already is replaced."""
    detach(layer)
    # Other hooks see the rounded input.
    layer.register_forward_pre_hook(quantizer, prepend=True)


def detach(layer: nn.Module) -> None:
    """Leaves the inputs of a layer as they are."""
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, InputQuantizer)]:
        del hooks[key]


def quantizer_of(layer: nn.Module) -> InputQuantizer | None:
    """Returns the quantizer of a layer's input; None if the layer has none."""
    hooks = layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, InputQuantizer)), None)
