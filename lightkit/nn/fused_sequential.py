"""A Sequential that runs convolution, ReLU and max-pool as one operation where they follow each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightkit.ops import conv_relu_pool


class FusedSequential(nn.Sequential):
    """A drop-in for :class:`torch.nn.Sequential`, of the same layers and with the same state dict.

    A convolution that a ReLU follows, with or without a max-pool after that, is run by
    `lightkit.ops.conv_relu_pool`, which gives the same but for rounding. That is not so, and the layers run one by one,
    where one of them has a hook, which would not be called, is a subclass or parametrized, or has settings that the
    operation does not know: stride, dilation, groups, another pool than 2x2.

    The result has the memory format of the input, as do the inputs of layers to which it may matter: code that takes a
    ``view`` works as before, and dropout draws as before.
    """

    def forward(self, input: Tensor) -> Tensor:
        """What the layers make of the input, one after the other."""
        x, reordered = input, False
        for run in _runs(self._modules.values()):
            if len(run) > 1 and x.dim() == 4:
                convolution, pool = run[0], len(run) == 3
                x, reordered = conv_relu_pool(x, convolution.weight, convolution.bias, convolution.padding, pool), True
                continue
            for layer in run:
                if reordered and _minds_order(layer):
                    x, reordered = _ordered_as(x, input), False
                x = layer(x)
        return _ordered_as(x, input) if reordered else x


def can_fuse(layers: nn.Sequential) -> bool:
    """Whether a Sequential has layers that `FusedSequential` runs as one."""
    return any(len(run) > 1 for run in _runs(layers.children()))


def _ordered_as(x: Tensor, input: Tensor) -> Tensor:
    """In the memory format of the input: the fused operation's results, and what torch makes of them, have another."""
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return x if channels_last else x.contiguous()


def _runs(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """The layers in order, those together that are run as one operation."""
    layers = list(layers)
    hooked_everywhere = (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
    index, count = 0, len(layers)
    while index < count:
        fusible = not hooked_everywhere and index + 1 < count and _is_convolution(layers[index])
        if fusible and _is_relu(layers[index + 1]):
            length = 3 if index + 2 < count and _is_pool(layers[index + 2]) else 2
        else:
            length = 1
        yield layers[index : index + length]
        index += length


def _is_plain(layer: nn.Module) -> bool:
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def _minds_order(layer: nn.Module) -> bool:
    """Whether the order of its input in memory may change what a layer does, or whom it calls."""
    # Random numbers are drawn in the order in memory.
    draws = isinstance(layer, (nn.modules.dropout._DropoutNd, nn.RReLU))
    return draws or not type(layer).__module__.startswith("torch.nn.") or bool(layer._modules) or not _is_plain(layer)


# Not isinstance: a subclass may do anything.


def _is_convolution(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and _is_plain(layer)
    )


def _is_relu(layer: nn.Module) -> bool:
    return type(layer) is nn.ReLU and _is_plain(layer)


def _is_pool(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.MaxPool2d
        and _pair(layer.kernel_size) == _pair(layer.stride) == (2, 2)
        and (_pair(layer.padding), _pair(layer.dilation)) == ((0, 0), (1, 1))
        and not layer.ceil_mode
        and not layer.return_indices
        and _is_plain(layer)
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
