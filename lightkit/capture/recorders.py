"""Translates calls of torch's functions into operations that can wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.capture.activations import ACTIVATION_RECORDERS
from lightkit.capture.arguments import are_plain, as_operand, find_product_dtype
from lightkit.capture.convolutions import CONVOLUTION_RECORDERS
from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node
from lightkit.capture.pools import POOL_RECORDERS
from lightkit.capture.recorder import Context, Recorder, requires_grad
from lightkit.ops.dropout import draw_seed
from lightkit.ops.layer_chain import MAX_LEVEL


def _linear(context: Context, input: Any, weight: Any, bias: Any = None) -> Node | None:
    # A linear layer alone is faster in torch: it joins the operations before it.
    if type(input) is not Deferred or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    operand = input.node
    dtype = find_product_dtype(context, operand, weight, bias)
    if dtype is None or len(operand.shape) != 2 or operand.shape[1] != weight.shape[1] or weight.numel() == 0:
        return None
    wants = requires_grad(context, operand, weight, bias)
    return Node("linear", (operand,), (weight, bias), (), (operand.shape[0], weight.shape[0]), dtype, wants)


def _relu(context: Context, input: Any, inplace: bool = False) -> Node | None:
    if type(input) is not Deferred:
        return None
    node = input.node
    return Node("relu", (node,), (), (), node.shape, node.dtype, requires_grad(context, node))


def _fake_quantize(
    context: Context, input: Any, scale: Any, zero_point: Any, quant_min: Any, quant_max: Any
) -> Node | None:
    # A range without a zero point is that of an output of a ReLU, which the kernels round as they write it.
    if (
        type(input) is not Deferred
        or type(scale) is not float
        or (zero_point, quant_min, quant_max) != (0, 0, MAX_LEVEL)
    ):
        return None
    node = input.node
    return Node("quantize", (node,), (), (scale,), node.shape, node.dtype, requires_grad(context, node))


def _flatten(context: Context, input: Any, start_dim: int = 0, end_dim: int = -1) -> Node | Deferred | None:
    if type(input) is not Deferred or start_dim != 1 or end_dim not in (-1, len(input.node.shape) - 1):
        return None
    return _flattened(context, input)


def _view(context: Context, input: Any, *shape: Any) -> Node | Deferred | None:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if type(input) is not Deferred or len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        return None
    batch, *sizes = input.node.shape
    width = prod(sizes)
    return _flattened(context, input) if shape in ((batch, width), (batch, -1), (-1, width)) else None


def _flattened(context: Context, input: Deferred) -> Node | Deferred | None:
    node = input.node
    if len(node.shape) == 2:
        return input
    if len(node.shape) not in (3, 4):
        return None
    shape = (node.shape[0], prod(node.shape[1:]))
    return Node("flatten", (node,), (), (), shape, node.dtype, requires_grad(context, node))


def _add(context: Context, input: Any, other: Any, *, alpha: Any = 1) -> Node | None:
    if (type(input) is not Deferred and type(other) is not Deferred) or alpha != 1 or context.autocast is not None:
        return None
    left, right = as_operand(input), as_operand(other)
    if left is None or right is None or tuple(left.shape) != tuple(right.shape) or left.dtype != right.dtype:
        return None
    return Node("add", (left, right), (), (), tuple(left.shape), left.dtype, requires_grad(context, left, right))


def _batch_norm(
    context: Context,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Node | None:
    operand = as_operand(input)
    if operand is None or len(operand.shape) not in (2, 3, 4) or context.autocast is not None:
        return None
    tensors = (running_mean, running_var, weight, bias)
    batch, channels, *size = operand.shape
    if (
        not are_plain(operand.dtype, *tensors)
        or any(t is not None and t.shape != (channels,) for t in tensors)
        or (running_mean is None) != (running_var is None)
        or (not training and running_mean is None)
        or (training and batch * prod(size) < 2)
        or not isinstance(momentum, float)
    ):
        return None
    wants = requires_grad(context, operand, weight, bias)
    return Node(
        "batch_norm", (operand,), tensors, (bool(training), momentum, eps), tuple(operand.shape), operand.dtype, wants
    )


def _dropout(
    context: Context, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Node | Deferred | None:
    if type(input) is not Deferred or not isinstance(p, (int, float)) or not 0 <= p < 1 or context.autocast is not None:
        return None
    if not training or p == 0:
        return input
    node, seed = input.node, draw_seed()
    return Node("dropout", (node,), (), (p,), node.shape, node.dtype, requires_grad(context, node), seed)


def _elementwise(function: Any) -> Recorder:
    """Returns the recorder of a function whose result has the shape of its input."""

    def record(context: Context, input: Any, *args: Any, **kwargs: Any) -> Node | None:
        if (
            type(input) is not Deferred
            or kwargs.get("inplace")
            or context.autocast is not None
            or not _are_constants((*args, *kwargs.values()))
        ):
            return None
        node, settings = input.node, (function, args, tuple(sorted(kwargs.items())))
        return Node("function", (node,), (), settings, node.shape, node.dtype, requires_grad(context, node))

    return Recorder(record)


def _are_constants(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in values)


RECORDERS: Mapping[Any, Recorder] = {
    F.linear: Recorder(_linear),
    F.relu: Recorder(_relu, inplace_at=1),
    torch.relu: Recorder(_relu),
    Tensor.relu: Recorder(_relu),
    torch.relu_: Recorder(_relu, in_place=True),
    Tensor.relu_: Recorder(_relu, in_place=True),
    torch.fake_quantize_per_tensor_affine: Recorder(_fake_quantize),
    torch.flatten: Recorder(_flatten),
    Tensor.flatten: Recorder(_flatten),
    Tensor.view: Recorder(_view),
    Tensor.reshape: Recorder(_view),
    torch.reshape: Recorder(_view),
    torch.add: Recorder(_add),
    Tensor.add: Recorder(_add),
    Tensor.add_: Recorder(_add, in_place=True),
    F.batch_norm: Recorder(_batch_norm),
    F.dropout: Recorder(_dropout, inplace_at=3),
    **ACTIVATION_RECORDERS,
    **CONVOLUTION_RECORDERS,
    **POOL_RECORDERS,
    **{
        function: _elementwise(function)
        for function in (
            *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax, torch.softmax, Tensor.softmax),
            F.logsigmoid,
        )
    },
}
