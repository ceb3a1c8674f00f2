"""The widths of layers as a checkpoint has them, and the change of a module to other widths.

A pruned model has the class and the arguments of the dense one, and tensors of smaller shapes. A checkpoint therefore
has, beside the arguments, the shapes of the smaller tensors as plain lists: see `WIDTHS_KEY`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightkit._util.printable import printable
from lightkit.errors import CheckpointError

# The key of a checkpoint with the shapes of pruned tensors by name: {"model.features.0.weight": [12, 1, 3, 3]}.
WIDTHS_KEY = "lightkit_widths"

# The rows of a gate in the weights of recurrent layers, by the mode of torch's layers.
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

# The shapes of modules before they were pruned, from which the widths of a checkpoint follow.
_dense_shapes: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


def tensors_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yields the parameters and buffers of the layers whose widths may change.

    Yields:
        The name of a tensor within ``module``, its layer, its name within the layer, and the tensor itself. A tensor
        with several names is yielded under each.
    """
    for prefix, layer in module.named_modules():
        if not has_widths(layer):
            continue
        for own, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.dim() > 0:
                yield f"{prefix}.{own}" if prefix else own, layer, own, tensor


def has_widths(layer: nn.Module) -> bool:
    """Returns True for a layer whose tensors `set_widths` can give other sizes."""
    if isinstance(layer, _ConvNd):
        return not isinstance(layer, _ConvTransposeNd)
    if isinstance(layer, nn.RNNBase):
        return layer.mode in GATES and layer.proj_size == 0
    return isinstance(layer, (nn.Linear, _BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of ``module`` whose sizes may change, by name."""
    return {name: tuple(tensor.shape) for name, _, _, tensor in tensors_of(module)}


def dense_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the tensors of ``module`` had when the function was called with it for the first time."""
    if module not in _dense_shapes:
        _dense_shapes[module] = shapes_of(module)
    return _dense_shapes[module]


def changed_shapes(module: nn.Module, dense: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Returns the shapes of tensors that differ from those of the dense module, as a checkpoint has them.

    Args:
        module: the module as it is.
        dense: the shapes of the dense module: see `shapes_of`.
    """
    return {name: list(shape) for name, shape in shapes_of(module).items() if shape != tuple(dense.get(name, shape))}


@torch.no_grad()
def set_widths(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Gives tensors of ``module`` other shapes, in place, and updates the attributes of their layers.

    A tensor keeps the values at the indices that both shapes have; other values are 0. A parameter stays the same
    object, so that optimizers keep it.

    Args:
        module: the module.
        shapes: the new shape of each tensor that changes, by name.

    Raises:
        ValueError: a name is unknown, the number of dimensions differs, or the tensors of a layer do not fit together;
            the message names the first such tensor. The module may then have changed in part.
    """
    known = {name: (layer, tensor) for name, layer, _, tensor in tensors_of(module)}
    changed: dict[int, tuple[str, nn.Module]] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise ValueError(f"{name} is no tensor of a layer whose width can change")
        layer, tensor = known[name]
        if len(shape) != tensor.dim() or any(size < 1 for size in shape):
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, which cannot become {tuple(shape)}")
        if tuple(shape) != tuple(tensor.shape):
            replace_data(tensor, _resized(tensor, shape))
        changed[id(layer)] = (name.rpartition(".")[0], layer)
    for name, layer in changed.values():
        update_attributes(layer)
        check_layer(layer, name)


def take_widths(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Gives the tensors of ``module`` the shapes that they have in a state dict, so that it can be loaded.

    Tensors that the state dict lacks keep their shapes, and so do those of another number of dimensions, whose error
    ``load_state_dict`` raises.

    Args:
        module: the module.
        state_dict: the state dict.
        prefix: the text before each name in the state dict.
    """
    shapes: dict[str, Sequence[int]] = {}
    for name, shape in shapes_of(module).items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and value.dim() == len(shape) and tuple(value.shape) != shape:
            shapes[name] = tuple(value.shape)
    try:
        set_widths(module, shapes)
    except ValueError as error:
        raise CheckpointError(f"the weights do not fit the layers of the model: {printable(str(error))}") from error


def apply_widths(module: nn.Module, checkpoint: Mapping[str, Any]) -> bool:
    """Gives a dense module the widths of a checkpoint, whose weights then fit.

    The checkpoint is not trusted. It may only make tensors smaller.

    Args:
        module: the module with the widths of its arguments; on the meta device no memory is allocated.
        checkpoint: the content of the checkpoint.

    Returns:
        True if the checkpoint has widths.

    Raises:
        CheckpointError: the entry is no mapping of shapes, or a shape does not fit.
    """
    widths = checkpoint.get(WIDTHS_KEY)
    if widths is None:
        return False
    dense = dense_shapes(module)
    if type(widths) is not dict:
        raise CheckpointError(f"the widths of the checkpoint are a {type(widths).__name__}, expected a mapping")
    for name, shape in widths.items():
        is_shape = type(name) is str and type(shape) is list and all(type(size) is int for size in shape)
        fits = is_shape and name in dense and len(shape) == len(dense[name])
        if not fits or not all(1 <= size <= limit for size, limit in zip(shape, dense[name], strict=True)):
            shown = printable(f"{name}: {shape}"[:100])
            raise CheckpointError(f"the widths of the checkpoint do not fit the model that it describes: {shown}")
    try:
        set_widths(module, widths)
    except ValueError as error:
        raise CheckpointError(f"the widths of the checkpoint do not fit together: {printable(str(error))}") from error
    return True


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Gives a tensor the values and the shape of ``data``; a parameter loses its gradient.

    Autograd checks a gradient against the shape that the parameter had when its accumulation node was made, and makes
    the node anew only for another dtype or device, so that the function changes the dtype in between.
    """
    if isinstance(tensor, nn.Parameter):
        tensor.grad = None
        tensor.data = data.new_empty(0, dtype=torch.float64 if tensor.dtype != torch.float64 else torch.float32)
    tensor.data = data


def update_attributes(layer: nn.Module) -> None:
    """Sets the attributes of a layer, such as ``out_channels``, to the shapes of its tensors."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _ConvNd):
        is_depthwise = layer.groups == layer.in_channels and layer.groups > 1
        layer.out_channels = layer.weight.shape[0]
        if is_depthwise:
            layer.groups = layer.out_channels
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.RNNBase):
        weights = dict(layer.named_parameters())
        layer.input_size, layer.hidden_size = weights["weight_ih_l0"].shape[1], weights["weight_hh_l0"].shape[1]
        layer.flatten_parameters()
    elif isinstance(layer, _BatchNorm):
        known = weight if isinstance(weight, Tensor) else layer.running_mean
        layer.num_features = layer.num_features if known is None else len(known)
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and isinstance(weight, Tensor):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)


def check_layer(layer: nn.Module, name: str = "the layer") -> None:
    """Rejects a layer whose tensors do not fit together; torch's native recurrent layers do not check all of them.

    Raises:
        ValueError: a tensor has another shape than the others need; the message has ``name`` and both shapes.
    """
    for own, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        want = _expected_shape(layer, own)
        if want is not None and tuple(tensor.shape) != want:
            raise ValueError(f"{name}.{own} has the shape {tuple(tensor.shape)}, expected {want}")


def _expected_shape(layer: nn.Module, own: str) -> tuple[int, ...] | None:
    if isinstance(layer, nn.Linear):
        return (layer.out_features,) if own == "bias" else None
    if isinstance(layer, _ConvNd):
        return (layer.out_channels,) if own == "bias" else (*layer.weight.shape[:2], *layer.kernel_size)
    if isinstance(layer, _BatchNorm):
        return None if own == "num_batches_tracked" else (layer.num_features,)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return tuple(layer.normalized_shape)
    if isinstance(layer, nn.RNNBase):
        rows = GATES[layer.mode] * layer.hidden_size
        if own.startswith("bias"):
            return (rows,)
        inner = layer.hidden_size * (2 if layer.bidirectional else 1)
        is_first = own.removesuffix("_reverse").endswith("_l0")
        columns = layer.hidden_size if "_hh_" in own else layer.input_size if is_first else inner
        return (rows, columns)
    return None


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    resized = tensor.detach().new_zeros(*shape)
    common = tuple(slice(0, min(pair)) for pair in zip(tensor.shape, shape, strict=True))
    resized[common] = tensor.detach()[common]
    return resized
