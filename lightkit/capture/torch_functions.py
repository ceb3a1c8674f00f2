"""The recorded operations in torch's functions, those in C++: a program may have patched those in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightkit.capture.node import Node
from lightkit.ops.dropout import dropout_reference
from lightkit.ops.layer_chain import MAX_LEVEL


def run(node: Node) -> Tensor:
    """Computes an operation by torch, from the values of its operands."""
    return TORCH[node.kind](node)


def _conv2d(node: Node) -> Tensor:
    weight, bias = node.tensors
    assert weight is not None
    return torch.conv2d(node.operand(), weight, bias, *node.settings)


def _conv1d(node: Node) -> Tensor:
    weight, bias = node.tensors
    stride, padding, dilation, groups = node.settings
    assert weight is not None
    return torch.conv1d(node.operand(), weight, bias, stride[1:], padding[1:], dilation[1:], groups)


def _linear(node: Node) -> Tensor:
    weight, bias = node.tensors
    assert weight is not None
    return linear(node.operand(), weight, bias)


def _batch_norm(node: Node) -> Tensor:
    mean, variance, weight, bias = node.tensors
    training, momentum, eps = node.settings
    return torch.batch_norm(
        node.operand(), weight, bias, mean, variance, training, momentum, eps, torch.backends.cudnn.enabled
    )


def _function(node: Node) -> Tensor:
    function, args, kwargs = node.settings
    return function(node.operand(), *args, **dict(kwargs))


TORCH: Mapping[str, Callable[[Node], Tensor]] = {
    "activation": lambda node: node.settings[0](node.operand()),
    "dropout": lambda node: dropout_reference(node.operand().contiguous(), *node.settings, seed=node.seed),
    "function": _function,
    "mean": lambda node: node.operand().mean(*node.settings),
    "add": lambda node: node.operand(0) + node.operand(1),
    "batch_norm": _batch_norm,
    "conv1d": _conv1d,
    "conv2d": _conv2d,
    "flatten": lambda node: node.operand().flatten(1),
    "linear": _linear,
    "max_pool1d": lambda node: torch.max_pool1d(node.operand(), *(width for _, width in node.settings)),
    "max_pool2d": lambda node: torch.max_pool2d(node.operand(), *node.settings),
    "quantize": lambda node: torch.fake_quantize_per_tensor_affine(node.operand(), node.settings[0], 0, 0, MAX_LEVEL),
    "relu": lambda node: torch.relu(node.operand()),
}
