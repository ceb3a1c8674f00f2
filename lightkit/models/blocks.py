"""Runs the convolutions of a Sequential, each with its ReLU and pool, as fused operations."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightkit.ops import conv_relu_pool

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def run_fused(layers: nn.Sequential, images: Tensor) -> Tensor:
    """What ``layers(images)`` gives, with `lightkit.ops.conv_relu_pool` in place of the layers where that is the same.

    It is not where a layer has a hook, which would not be called, or stands for something else than its class says:
    a subclass or parametrization, settings that the operation does not know, any sequence but blocks of convolution,
    ReLU and, perhaps, pool. Then the layers run one by one.
    """
    blocks = _blocks(layers)
    if blocks is None:
        return layers(images)
    for convolution, pool in blocks:
        images = conv_relu_pool(images, convolution.weight, convolution.bias, convolution.padding, pool)
    return images


def _blocks(layers: nn.Sequential) -> list[tuple[nn.Conv2d, bool]] | None:
    """The convolutions, each with whether a pool follows; None if the layers are not made of plain blocks."""
    if _has_hooks(layers) or any(getattr(torch_module, f"_global{name}") for name in _HOOKS):
        return None
    blocks: list[tuple[nn.Conv2d, bool]] = []
    expected: tuple[type, ...] = (nn.Conv2d,)
    for layer in layers:
        # Not isinstance: a subclass may do anything.
        if type(layer) not in expected or _has_hooks(layer) or not _is_known(layer):
            return None
        if type(layer) is nn.Conv2d:
            blocks.append((layer, False))
            expected = (nn.ReLU,)
        elif type(layer) is nn.ReLU:
            expected = (nn.MaxPool2d, nn.Conv2d)
        else:
            blocks[-1] = (blocks[-1][0], True)
            expected = (nn.Conv2d,)
    return blocks if nn.ReLU not in expected else None


def _has_hooks(layer: nn.Module) -> bool:
    return any(getattr(layer, name) for name in _HOOKS) or "forward" in layer.__dict__


def _is_known(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return (
            layer.stride == (1, 1)
            and layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )
    if type(layer) is nn.MaxPool2d:
        options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return options == (2, 2, 0, 1) and not layer.ceil_mode and not layer.return_indices
    return True
