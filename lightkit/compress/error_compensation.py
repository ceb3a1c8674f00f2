"""Rounding of a trained weight so that the outputs of its layer change least, instead of the weight itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightkit.compress.weight_formats import WeightFormat, largest_level
from lightkit.ops.fake_quantize import fake_quantize_weights

# The share of the mean of the diagonal that is added to it, as in the paper, so that the inverse exists.
_DAMPING = 0.01

# The most inputs of an output: their products with each other take 128 MiB.
_MAX_INPUTS = 4096


class InputProducts:
    """The sum over samples of the products of a layer's inputs with each other, which rounding errors weigh with.

    Args:
        layer: a convolution or a linear layer.

    Attributes:
        total: float64 ``(inputs, inputs)``; None before the first sample. The inputs are those of one output.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        self.layer = layer
        self.total: Tensor | None = None

    @staticmethod
    def are_known(layer: nn.Module) -> bool:
        """Returns True if the class knows the inputs of an output of ``layer``."""
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            return False
        return isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight[0].numel() <= _MAX_INPUTS

    def observe(self, input: Tensor) -> None:
        """Adds the products of a batch."""
        input = input.detach()
        if isinstance(self.layer, nn.Conv2d):
            if isinstance(self.layer.padding, str):
                return
            settings = (self.layer.dilation, self.layer.padding, self.layer.stride)
            input = F.unfold(input, self.layer.kernel_size, *settings).transpose(1, 2)
        values = input.reshape(-1, input.shape[-1]).double()
        products = values.T @ values
        self.total = products if self.total is None else self.total + products


def compensated(weight: Tensor, weight_format: WeightFormat, products: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the levels of a weight by GPTQ [1]_, int8 of its shape, and the scales of its rows, float32.

    The columns of the weight are rounded one after the other, with the scales of rounding to the nearest level. The
    error of each is spread over the columns that are still to be rounded, so that the outputs change least.

    Args:
        weight: the weight of a convolution or linear layer, floating point.
        weight_format: its bits.
        products: float64 ``(inputs, inputs)`` on any device, see `InputProducts`.

    References:
        .. [1] Frantar, Ashkboos, Hoefler and Alistarh, GPTQ: Accurate Post-Training Quantization for Generative
           Pre-trained Transformers, ICLR 2023.
    """
    source = weight.detach().float().contiguous()
    (scales,) = fake_quantize_weights(
        [weight_format.rows(source)], [torch.empty_like(weight_format.rows(source))], weight_format.bits
    )
    rows = source.flatten(1).double()
    steps = scales.double().view(len(rows), -1).repeat_interleave(weight_format.group_size or rows.shape[1], dim=1)
    # Lightning moves a module to the CPU after a run, and the products stay where they were summed.
    factor = _inverse_factor(products.to(weight.device))
    levels = torch.empty_like(rows)
    for column in range(rows.shape[1]):
        step = steps[:, column]
        levels[:, column] = _nearest(rows[:, column] / step, weight_format.bits)
        error = (rows[:, column] - levels[:, column] * step) / factor[column, column]
        rows[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return levels.to(torch.int8).view(weight.shape), scales


def _inverse_factor(products: Tensor) -> Tensor:
    """Returns the upper triangular factor U of the damped inverse, ``U^T U``."""
    damped = products.clone()
    diagonal = damped.diagonal()
    # An input that is always 0 has no say; its products are those of the identity.
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * float(diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _nearest(values: Tensor, bits: int) -> Tensor:
    largest = largest_level(bits)
    levels = values.round() if bits != 2 else (values / 2).floor() * 2 + 1
    return levels.clamp(-largest, largest)
