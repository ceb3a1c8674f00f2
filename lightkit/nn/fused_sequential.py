"""A Sequential that runs consecutive convolutions, ReLUs, max-pools and linear layers as one operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightkit._util.originals import Originals
from lightkit._util.plain_modules import are_all_hooked, is_plain
from lightkit.nn.input_quantizer import InputQuantizer, quantizer_of
from lightkit.nn.int8_layers import int8_chain_of
from lightkit.ops._dispatch import is_autocast
from lightkit.ops.layer_chain import ChainLayer, is_faster, layer_chain

_LAYERS = ("Sequential", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear")

# The functions of torch that the layers call and the operation does not.
_ORIGINALS = Originals(
    (torch,),
    nn,
    *(f"{layer}.{method}" for layer in _LAYERS for method in ("forward", "__call__")),
    "Module._call_impl",
    "Conv2d._conv_forward",
    *(f"functional.{name}" for name in ("conv2d", "relu", "max_pool2d", "linear")),
)


class FusedSequential(nn.Sequential):
    """A drop-in for :class:`torch.nn.Sequential`, of the same layers and with the same state dict.

    `lightkit.ops.layer_chain` runs convolutions with a ReLU, with or without a max-pool behind it, and the linear
    layers behind them, as one operation, with the same result except for rounding. The layers run one by one if one of
    them has a hook, which would not be called, is a subclass or parametrized, has settings that the operation does not
    support (stride, dilation, groups, a pool other than 2x2), or is faster in torch. The layers of a nested Sequential
    run as if they were layers of this one, unless the nested one has a hook. torch.export, torch.jit.trace and devices
    other than a CPU see torch's layers; torch.jit.script cannot compile the module. The layers run one by one, too, if
    ``forward`` of torch's classes or a function that the classes call, such as ``torch.nn.functional.conv2d``, is
    patched, and for an input that the operation rejects: errors are those of torch's layers.

    In evaluation without autograd, layers whose weights and inputs are all rounded run as one operation on integers:
    see `lightkit.compress.apply_quantization` and `lightkit.ops.Int8Chain`.

    The result has the memory format of the input, and so have the inputs of layers that may depend on it: code that
    calls ``view`` works as with torch's layers, and dropout draws the same numbers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output of the layers."""
        return run_fused(_layers(self), input)


def run_fused(layers: Iterable[nn.Module], input: Tensor) -> Tensor:
    """Runs ``layers`` in order on ``input`` as `FusedSequential` does; returns the output of the last one."""
    if are_all_hooked() or not (torch.compiler.is_compiling() or _ORIGINALS.are_in_place()) or _is_traced():
        for layer in layers:
            input = layer(input)
        return input
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        layers = tuple(layers)
        chain = int8_chain_of(layers, input)
        if chain is not None:
            # torch's layers raise other errors for shapes that do not fit.
            with suppress(ValueError):
                return _ordered_as(chain(input), input)
    runs = list(_runs(_unnested(layers)))
    x, reordered, index = input, False, 0
    while index < len(runs):
        chain, end = _chain(runs, index, x)
        if chain:
            quantizer = quantizer_of(runs[index][0])
            try:
                x = x if quantizer is None else quantizer.round(x)
                x, reordered, index = layer_chain(x, chain), chain[-1].weight.dim() == 4, end
                continue
            except ValueError:
                # torch's layers raise other errors for shapes that do not fit.
                pass
        for layer in runs[index]:
            if reordered and _depends_on_memory_format(layer):
                x, reordered = _ordered_as(x, input), False
            x = layer(x)
        index += 1
    return _ordered_as(x, input) if reordered else x


def can_fuse(layers: nn.Sequential) -> bool:
    """Returns True if a Sequential has layers that `FusedSequential` may run as one operation."""
    return any(type(run[0]) is nn.Conv2d and len(run) > 1 for run in _runs(_unnested(layers.children())))


def _chain(runs: list[list[nn.Module]], begin: int, x: Tensor) -> tuple[list[ChainLayer], int]:
    """Returns the layers of ``runs`` from index ``begin`` on that form one operation, and the index of the next run.

    The list of layers is empty if torch must run the layers at ``begin``. A chain begins with a convolution: linear
    layers alone are faster in torch.
    """
    chain: list[ChainLayer] = []
    # Layers may return any object, such as a tuple.
    if not isinstance(x, Tensor) or not x.is_cpu or x.dim() != 4:
        return chain, begin
    end = begin
    dtype = torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype
    # Height and width of the next layer's input; () for a linear layer.
    size: tuple[int, ...] = tuple(x.shape[2:])
    for index in range(begin, len(runs)):
        run = runs[index]
        # A Conv2d, a Linear or any other layer, as `kind` tells.
        first: Any = run[0]
        kind = type(first)
        scale = _scale_before(first, chain)
        if scale is None:
            break
        if kind is nn.Conv2d and len(run) > 1 and size:
            weight, bias = _parameters(first)
            padding, pool = first.padding, len(run) == 3
            if not is_faster(size[0] * size[1], weight, dtype, pool):
                break
            chain.append(ChainLayer(weight, bias, padding, True, pool))
            rows = size[0] + 2 * padding[0] - first.kernel_size[0] + 1
            columns = size[1] + 2 * padding[1] - first.kernel_size[1] + 1
            size = (rows // 2, columns // 2) if pool else (rows, columns)
        elif kind is nn.Linear and chain and not size and _is_linear(first):
            weight, bias = _parameters(first)
            if not is_faster(1, weight, dtype):
                break
            chain.append(ChainLayer(weight, bias, (0, 0), len(run) == 2))
        elif kind is nn.Flatten and chain and _is_flatten(first):
            size = ()
            continue
        else:
            break
        if scale:
            chain[-2] = chain[-2]._replace(output_scale=scale)
        end = index + 1
    return chain, end


def _scale_before(layer: nn.Module, chain: list[ChainLayer]) -> float | None:
    """Returns the scale to which the layer before ``layer`` in a chain rounds its output, 0 for none.

    The result is None if the operation cannot round as the quantizer of ``layer`` does.
    """
    quantizer = quantizer_of(layer)
    if quantizer is None or not chain:
        return 0.0
    return quantizer.scale if chain[-1].relu and quantizer.zero_point == 0 else None


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    # Not as attributes, which a module looks up in several dicts.
    parameters: dict[str, Any] = layer._parameters
    return parameters["weight"], parameters["bias"]


def _layers(module: nn.Module) -> Iterable[Any]:
    return module._modules.values()


def _unnested(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yields the layers in order; yields the layers of a nested Sequential in its place."""
    for layer in layers:
        if type(layer) in (nn.Sequential, FusedSequential) and _is_plain(layer):
            yield from _unnested(_layers(layer))
        else:
            yield layer


def _ordered_as(x: Tensor, input: Tensor) -> Tensor:
    """Returns ``x`` in the memory format of ``input``: the output of the fused operation is channels-last."""
    if not isinstance(x, Tensor):
        return x
    channels_last = (
        isinstance(input, Tensor)
        and input.is_contiguous(memory_format=torch.channels_last)
        and not input.is_contiguous()
    )
    return x if channels_last else x.contiguous()


def _runs(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yields lists of consecutive layers; each list makes one layer of a chain, or has one other layer."""
    run: list[nn.Module] = []
    for layer in layers:
        # A ReLU or a pool belongs to the run before it.
        if len(run) == 1 and _is_relu(layer) and (_is_convolution(run[0]) or _is_linear(run[0])):
            run.append(layer)
        elif len(run) == 2 and type(run[0]) is nn.Conv2d and _is_pool(layer):
            run.append(layer)
        else:
            if run:
                yield run
            run = [layer]
    if run:
        yield run


def _is_traced() -> bool:
    """Returns True while torch.export or torch.jit.trace records the operations, for programs without lightkit."""
    return torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch.jit.is_tracing())


def _is_plain(layer: nn.Module) -> bool:
    """Returns True for a layer whose call does what its class says, except that it may round its input."""
    return is_plain(layer, _is_frozen)


def _is_frozen(hook: Any) -> bool:
    """Returns True for a quantizer that changes its input and records nothing."""
    return type(hook) is InputQuantizer and hook.scale is not None and not hook.is_observing


def _has_parameters(layer: nn.Module) -> bool:
    """Returns True if weight and bias of ``layer`` are parameters, not buffers or tensors that pruning computes."""
    parameters = layer._parameters
    return parameters.get("weight") is not None and "bias" in parameters


def _depends_on_memory_format(layer: nn.Module) -> bool:
    """Returns True if a layer may depend on the memory format of its input."""
    # Random numbers are drawn in the order of the memory.
    draws = isinstance(layer, (nn.modules.dropout._DropoutNd, nn.RReLU))
    # `_ordered_as` does not reorder the tensors of a tuple.
    gives_tuple = getattr(layer, "return_indices", False)
    is_torchs = type(layer).__module__.startswith("torch.nn.") and not layer._modules and _is_plain(layer)
    return draws or gives_tuple or not is_torchs


# These compare types, not isinstance: a subclass may do anything.


def _is_convolution(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and _is_plain(layer)
        and _has_parameters(layer)
    )


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and _is_plain(layer) and _has_parameters(layer)


def _is_flatten(layer: nn.Module) -> bool:
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) and _is_plain(layer)


def _is_relu(layer: nn.Module) -> bool:
    return type(layer) is nn.ReLU and _is_plain(layer)


def _is_pool(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.MaxPool2d
        and layer.kernel_size in (2, (2, 2))
        and layer.stride in (2, (2, 2))
        and layer.padding in (0, (0, 0))
        and layer.dilation in (1, (1, 1))
        and not layer.ceil_mode
        and not layer.return_indices
        and _is_plain(layer)
    )
