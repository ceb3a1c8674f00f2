"""Translates calls of torch's functions into operations that can wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from lightkit.capture.activations import ACTIVATION_RECORDERS
from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node, Operand
from lightkit.capture.recorder import Context, Recorder, requires_grad
from lightkit.ops.dropout import draw_seed
from lightkit.ops.layer_chain import MAX_LEVEL

_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, Parameter)


def _operand(tensor: Any) -> Operand | None:
    """Returns what an operation computes with; None if the kernels do not take it."""
    if type(tensor) is Deferred:
        return tensor.node
    if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.layout is not torch.strided:
        return None
    return tensor if tensor.dtype in _DTYPES and tensor.numel() > 0 else None


def _are_plain(dtype: torch.dtype, *tensors: Any) -> bool:
    """Returns True for dense tensors of a dtype on a CPU; None stands for a tensor that is not given."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.dtype != dtype or not t.is_cpu or t.layout is not torch.strided:
            return False
    return True


def _result_dtype(context: Context, operand: Operand, weight: Tensor) -> torch.dtype | None:
    """Returns the dtype of a product with a weight; None if torch would not compute it, or not cast as expected."""
    if context.autocast is None:
        return operand.dtype if weight.dtype == operand.dtype else None
    if weight.dtype != torch.float32 or operand.dtype not in (torch.float32, context.autocast):
        return None
    return context.autocast


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and all(isinstance(v, int) for v in value):
        return value[0], value[-1]
    return None


def _convolved(context: Context, input: Any, weight: Any, bias: Any, dims: int) -> tuple[Operand, torch.dtype] | None:
    """Returns the data of a convolution and the dtype of its result; None for tensors that no kernel takes."""
    operand = _operand(input)
    if operand is None or len(operand.shape) != dims or not isinstance(weight, Tensor) or weight.dim() != dims:
        return None
    dtype = _result_dtype(context, operand, weight)
    if dtype is None or not _are_plain(weight.dtype, weight, bias):
        return None
    return None if bias is not None and bias.shape != weight.shape[:1] else (operand, dtype)


def _conv2d(
    context: Context,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Node | None:
    taken = _convolved(context, input, weight, bias, 4)
    if taken is None:
        return None
    operand, dtype = taken
    arguments = (_hashable(stride), _hashable(padding), _hashable(dilation), groups)
    found = _conv2d_sizes(tuple(operand.shape), tuple(weight.shape), *arguments)
    if found is None:
        return None
    settings, shape = found
    wants = requires_grad(context, operand, weight, bias)
    return Node("conv2d", (operand,), (weight, bias), settings, shape, dtype, wants)


def _conv1d(
    context: Context,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Node | None:
    """Records a convolution of sequences, with the settings of a convolution of images of height 1."""
    taken = _convolved(context, input, weight, bias, 3)
    if taken is None:
        return None
    operand, dtype = taken
    steps, gaps = _single(stride), _single(dilation)
    border = padding if isinstance(padding, str) else _single(padding)
    if steps is None or gaps is None or border is None:
        return None
    batch, channels, length = operand.shape
    found = _conv2d_sizes(
        (batch, channels, 1, length),
        (*weight.shape[:2], 1, weight.shape[2]),
        (1, steps),
        border if isinstance(border, str) else (0, border),
        (1, gaps),
        groups,
    )
    if found is None:
        return None
    settings, shape = found
    wants = requires_grad(context, operand, weight, bias)
    return Node("conv1d", (operand,), (weight, bias), settings, (*shape[:2], shape[3]), dtype, wants)


def _single(value: Any) -> int | None:
    """Returns the number of a setting for one dimension; None if it is not one number."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _hashable(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


@lru_cache(maxsize=1024)
def _conv2d_sizes(
    size: tuple[int, ...], weight: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[tuple[Any, ...], tuple[int, ...]] | None:
    """Returns the settings of a convolution in pairs, and the shape of its output; None if torch refuses the call."""
    steps, gaps = _pair(stride), _pair(dilation)
    if len(weight) != 4 or 0 in weight or steps is None or gaps is None or min(*steps, *gaps, groups) < 1:
        return None
    batch, channels, *image = size
    kernel = weight[2:]
    borders = _pair(_padding_by_name(padding, kernel, steps, gaps) if isinstance(padding, str) else padding)
    if borders is None or min(borders) < 0 or weight[1] * groups != channels or weight[0] % groups != 0:
        return None
    out = _output_sizes(image, kernel, steps, borders, gaps)
    return None if min(out) < 1 else ((steps, borders, gaps, groups), (batch, weight[0], *out))


def _output_sizes(image: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    return [
        (size + 2 * border - gap * (k - 1) - 1) // step + 1
        for size, k, step, border, gap in zip(image, kernel, stride, padding, dilation, strict=True)
    ]


def _padding_by_name(padding: str, kernel: Any, stride: Any, dilation: Any) -> Any:
    """Returns the zeros on each side for ``"valid"`` and ``"same"``; None where they are unequal or torch refuses."""
    if padding == "valid":
        return 0, 0
    totals = [gap * (k - 1) for k, gap in zip(kernel, dilation or (0, 0), strict=True)]
    if padding != "same" or stride != (1, 1) or any(total % 2 for total in totals):
        return None
    return totals[0] // 2, totals[1] // 2


def _linear(context: Context, input: Any, weight: Any, bias: Any = None) -> Node | None:
    # A linear layer alone is faster in torch: it joins the operations before it.
    if type(input) is not Deferred or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    operand = input.node
    dtype = _result_dtype(context, operand, weight)
    if (
        dtype is None
        or len(operand.shape) != 2
        or operand.shape[1] != weight.shape[1]
        or weight.numel() == 0
        or not _are_plain(weight.dtype, weight, bias)
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
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


def _max_pool2d(
    context: Context,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Node | None:
    if type(input) is not Deferred or ceil_mode or return_indices or len(input.node.shape) != 4:
        return None
    node = input.node
    arguments = (_hashable(kernel_size), _hashable(stride), _hashable(padding), _hashable(dilation))
    found = _max_pool2d_sizes(node.shape, *arguments)
    if found is None:
        return None
    settings, shape = found
    return Node("max_pool2d", (node,), (), settings, shape, node.dtype, requires_grad(context, node))


def _max_pool1d(
    context: Context,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Node | None:
    if type(input) is not Deferred or ceil_mode or return_indices or len(input.node.shape) != 3:
        return None
    node = input.node
    kernel = _single(kernel_size)
    settings = (
        kernel,
        kernel if stride is None or stride == () else _single(stride),
        _single(padding),
        _single(dilation),
    )
    if None in settings:
        return None
    kernel, steps, border, gaps = settings
    found = _max_pool2d_sizes((*node.shape[:2], 1, node.shape[2]), (1, kernel), (1, steps), (0, border), (1, gaps))
    if found is None:
        return None
    shape = (*node.shape[:2], found[1][3])
    return Node("max_pool1d", (node,), (), settings, shape, node.dtype, requires_grad(context, node))


@lru_cache(maxsize=1024)
def _max_pool2d_sizes(
    size: tuple[int, ...], kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[tuple[Any, ...], tuple[int, ...]] | None:
    """Returns the settings of a pool in pairs, and the shape of its output; None if torch refuses the call."""
    kernel = _pair(kernel_size)
    steps = kernel if stride is None or stride == () else _pair(stride)
    borders, gaps = _pair(padding), _pair(dilation)
    if kernel is None or steps is None or borders is None or gaps is None or min(*kernel, *steps, *gaps) < 1:
        return None
    if min(borders) < 0 or any(2 * border > k for border, k in zip(borders, kernel, strict=True)):
        return None
    out = _output_sizes(size[2:], kernel, steps, borders, gaps)
    return None if min(out) < 1 else ((kernel, steps, borders, gaps), (*size[:2], *out))


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
    left, right = _operand(input), _operand(other)
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
    operand = _operand(input)
    if operand is None or len(operand.shape) not in (2, 3, 4) or context.autocast is not None:
        return None
    tensors = (running_mean, running_var, weight, bias)
    batch, channels, *size = operand.shape
    if (
        not _are_plain(operand.dtype, *tensors)
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


def _mean_pool2d(context: Context, input: Any, output_size: Any) -> Node | None:
    if type(input) is not Deferred or len(input.node.shape) != 4 or _pair(output_size) != (1, 1):
        return None
    return _mean(context, input, (2, 3), keepdim=True)


def _mean_pool1d(context: Context, input: Any, output_size: Any) -> Node | None:
    if type(input) is not Deferred or len(input.node.shape) != 3 or _single(output_size) != 1:
        return None
    return _mean(context, input, 2, keepdim=True)


def _mean(context: Context, input: Any, dim: Any = None, keepdim: bool = False) -> Node | None:
    if type(input) is not Deferred or len(input.node.shape) not in (3, 4) or context.autocast is not None:
        return None
    node = input.node
    dims = tuple(range(2, len(node.shape)))
    given = (dim,) if isinstance(dim, int) else dim
    if not isinstance(given, (tuple, list)) or sorted(d % len(node.shape) for d in given) != list(dims):
        return None
    shape = (*node.shape[:2], *(1 for _ in dims)) if keepdim else node.shape[:2]
    return Node("mean", (node,), (), (dims, bool(keepdim)), shape, node.dtype, requires_grad(context, node))


RECORDERS: Mapping[Any, Recorder] = {
    torch.conv2d: Recorder(_conv2d),
    torch.conv1d: Recorder(_conv1d),
    F.linear: Recorder(_linear),
    F.relu: Recorder(_relu, inplace_at=1),
    torch.relu: Recorder(_relu),
    Tensor.relu: Recorder(_relu),
    torch.relu_: Recorder(_relu, in_place=True),
    Tensor.relu_: Recorder(_relu, in_place=True),
    torch.fake_quantize_per_tensor_affine: Recorder(_fake_quantize),
    F.max_pool2d: Recorder(_max_pool2d),
    torch.max_pool2d: Recorder(_max_pool2d),
    F.max_pool1d: Recorder(_max_pool1d),
    torch.max_pool1d: Recorder(_max_pool1d),
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
    F.adaptive_avg_pool2d: Recorder(_mean_pool2d),
    torch.adaptive_avg_pool1d: Recorder(_mean_pool1d),
    torch.mean: Recorder(_mean),
    Tensor.mean: Recorder(_mean),
    **ACTIVATION_RECORDERS,
    **{
        function: _elementwise(function)
        for function in (
            *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax, torch.softmax, Tensor.softmax),
            F.logsigmoid,
        )
    },
}
