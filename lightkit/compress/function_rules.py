"""Rules by which channels pass through the functions between layers, by the names of the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightkit.compress.channel_record import ChannelRecord
from lightkit.compress.units import FIXED

# Functions and methods that compute each value from the value at its place, by name.
_ELEMENTWISE = {
    *(
        "fake_quantize_per_tensor_affine",
        "relu",
        "relu_",
        "relu6",
        "gelu",
        "silu",
        "mish",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "tanh",
        "sigmoid",
    ),
    *("hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid", "tanhshrink", "hardshrink"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "exp", "log", "sqrt"),
    *("abs", "neg", "square", "clamp", "clamp_min", "contiguous", "clone", "detach", "to", "float", "double", "half"),
    *("bfloat16", "type", "requires_grad_"),
}

# Functions of one or two tensors that compute each value from the values at its place.
_BINARY = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "true_divide", "maximum", "minimum", "pow"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"),
    *("__truediv__", "__rtruediv__", "rsub", "multiply", "subtract", "divide", "__pow__"),
}

# Functions that keep the channels at axis 1 and pool the axes after it.
_POOLS = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for n in (1, 2, 3)}
_POOLS |= {f"max_pool{n}d_with_indices" for n in (1, 2, 3)} | {"interpolate", "pad", "upsample"}

_RESHAPES = {"flatten", "view", "reshape", "ravel", "unflatten", "view_as", "reshape_as"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "std", "var"}

# The indices of a tensor that take no values apart.
_INDICES = (int, slice, type(Ellipsis))


def apply_function_rule(
    record: ChannelRecord, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Records what a call of a function does with channels; fixes them if there is no rule.

    Args:
        record: the record.
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned.
    """
    inputs = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
    for x in inputs:
        # A parameter that a function reads by itself, outside of its layer.
        if isinstance(x, nn.Parameter) and id(x) in record.uses and isinstance(output, Tensor):
            record.fix_parameter(x)
    labelled = [x for x in inputs if record.channels_of(x) is not None]
    if not labelled or not any(isinstance(x, Tensor) for x in tree_leaves(output)):
        return
    name = getattr(func, "__name__", "")
    x = labelled[0]
    handled = False
    if name in _ELEMENTWISE or name in _POOLS:
        handled = _see_same_axis(record, x, name, output)
    elif name in _BINARY and isinstance(output, Tensor):
        handled = _see_binary(record, inputs, output)
    elif name in _RESHAPES and isinstance(output, Tensor):
        handled = _see_reshape(record, x, output)
    elif name in _REDUCTIONS and isinstance(output, Tensor):
        handled = _see_reduction(record, x, args, kwargs, output)
    elif name in ("permute", "transpose", "swapaxes", "movedim", "t", "mT", "T"):
        handled = _see_transposition(record, x, output)
    elif name in ("cat", "concat", "concatenate"):
        handled = _see_concatenation(record, args, kwargs, output)
    elif name in ("squeeze", "unsqueeze"):
        handled = _see_reshape(record, x, output)
    elif name == "__getitem__":
        handled = _see_index(record, x, args[1], output)
    if not handled:
        record.fix_tensors(labelled, f"{name or 'a function'} reads it")


def _see_same_axis(record: ChannelRecord, x: Tensor, name: str, output: Any) -> bool:
    channels = record.channels_of(x)
    assert channels is not None
    outputs = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
    if name in _POOLS and channels.axis != 1:
        return False
    if any(part.dim() != x.dim() or part.shape[channels.axis] != len(channels.labels) for part in outputs):
        return False
    for part in outputs:
        record.set_channels(part, channels.axis, channels.labels)
    return True


def _see_binary(record: ChannelRecord, inputs: list[Tensor], output: Tensor) -> bool:
    found: tuple[int, Tensor] | None = None
    for x in inputs:
        channels = record.channels_of(x)
        # Axes count from the end, as broadcasting does.
        if channels is not None:
            place = (channels.axis - x.dim(), channels.labels)
            if found is None:
                found = place
            elif found[0] != place[0]:
                return False
            else:
                record.units.join(found[1], place[1])
    assert found is not None
    axis, labels = found
    if output.shape[axis] != len(labels):
        return False
    for x in inputs:
        if record.channels_of(x) is None and x.dim() >= -axis and x.shape[axis] != 1:
            # Values that belong to single channels, and that no layer computes.
            return False
    record.set_channels(output, output.dim() + axis, labels)
    return True


def _see_reshape(record: ChannelRecord, x: Tensor, output: Tensor) -> bool:
    """Follows channels whose axis stays as it is, or is merged with the axes after it."""
    channels = record.channels_of(x)
    assert channels is not None
    before = prod(x.shape[: channels.axis])
    count = len(channels.labels)
    for axis in range(output.dim()):
        size = output.shape[axis]
        if prod(output.shape[:axis]) == before and size % count == 0 and size > 1 - (count == 1):
            inner = size // count
            if prod(x.shape[channels.axis + 1 :]) % inner == 0 and _is_leading(x.shape[channels.axis + 1 :], inner):
                record.set_channels(output, axis, channels.labels.repeat_interleave(inner))
                return True
    return False


def _see_reduction(
    record: ChannelRecord, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> bool:
    channels = record.channels_of(x)
    assert channels is not None
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None or not (isinstance(dims, int) or all(isinstance(d, int) for d in dims)):
        return False
    reduced = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    if channels.axis in reduced:
        return False
    keeps = output.dim() == x.dim()
    record.set_channels(
        output, channels.axis - (0 if keeps else sum(d < channels.axis for d in reduced)), channels.labels
    )
    return True


def _see_transposition(record: ChannelRecord, x: Tensor, output: Any) -> bool:
    channels = record.channels_of(x)
    if not isinstance(output, Tensor) or output.dim() != x.dim() or channels is None:
        return False
    # The strides of a view tell where the axis is, unless another axis has the same stride and size.
    wanted = (x.stride(channels.axis), x.shape[channels.axis])
    places = [axis for axis in range(output.dim()) if (output.stride(axis), output.shape[axis]) == wanted]
    if len(places) != 1:
        return False
    record.set_channels(output, places[0], channels.labels)
    return True


def _see_concatenation(record: ChannelRecord, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
    parts = kwargs.get("tensors", args[0] if args else ())
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % output.dim()
    channels = [record.channels_of(part) for part in parts]
    axes = {c.axis for c in channels if c is not None}
    if axes != {dim}:
        return False
    labels = [
        torch.full((part.shape[dim],), FIXED) if c is None else c.labels
        for part, c in zip(parts, channels, strict=True)
    ]
    record.set_channels(output, dim, torch.cat(labels))
    return True


def _see_index(record: ChannelRecord, x: Tensor, index: Any, output: Any) -> bool:
    channels = record.channels_of(x)
    assert channels is not None
    indices = index if isinstance(index, tuple) else (index,)
    if not isinstance(output, Tensor) or not all(i is None or isinstance(i, _INDICES) for i in indices):
        return False
    indexed = sum(i is not None and i is not Ellipsis for i in indices)
    whole = [slice(None)] * (x.dim() - indexed)
    at = indices.index(Ellipsis) if Ellipsis in indices else len(indices)
    taken, given = 0, 0
    for i in (*indices[:at], *whole, *indices[at + 1 :]):
        if i is not None and taken == channels.axis:
            if i != slice(None):
                return False
            record.set_channels(output, given, channels.labels)
            return True
        taken += i is not None
        given += not isinstance(i, int)
    return False


def _is_leading(sizes: Sequence[int], inner: int) -> bool:
    """Returns True if ``inner`` is the product of the first of ``sizes``."""
    product = 1
    for size in sizes:
        if product == inner:
            return True
        product *= size
    return product == inner
