"""Translates calls of torch's activation functions into operations that can wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node
from lightkit.capture.recorder import Context, Recorder, requires_grad
from lightkit.ops.activation import Activation


def _recorder(
    make: Callable[..., Activation | None], inplace_at: int | None = None, in_place: bool = False
) -> Recorder:
    """Returns the recorder of a function.

    Args:
        make: takes the arguments of torch's function after the first, and returns what it computes; None for arguments
            that torch refuses or that no kernel takes.
        inplace_at: the position of the argument ``inplace``; None for none.
        in_place: True if the function writes the result to its first argument.
    """

    def record(context: Context, input: Any, *args: Any, **kwargs: Any) -> Node | None:
        if type(input) is not Deferred or context.autocast is not None:
            return None
        activation = make(*args, **kwargs)
        if activation is None or not all(type(argument) in (int, float) for argument in activation[1:]):
            return None
        node = input.node
        wants = requires_grad(context, node)
        return Node("activation", (node,), (), (activation,), node.shape, node.dtype, wants)

    return Recorder(record, in_place, inplace_at)


def _leaky_relu(negative_slope: Any = 0.01, inplace: bool = False) -> Activation | None:
    return Activation("leaky_relu", negative_slope) if negative_slope >= 0 else None


def _hardtanh(min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Activation | None:
    return Activation("hardtanh", min_val, max_val) if min_val < max_val else None


def _elu(alpha: Any = 1.0, inplace: bool = False) -> Activation | None:
    return Activation("elu", alpha) if alpha >= 0 else None


def _gelu(approximate: str = "none") -> Activation | None:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None if name is None else Activation(name)


def _softplus(beta: Any = 1.0, threshold: Any = 20.0) -> Activation | None:
    return Activation("softplus", beta, threshold) if beta > 0 else None


def _plain(name: str) -> Callable[..., Activation]:
    return lambda inplace=False: Activation(name)


def _without_arguments(name: str) -> Callable[..., Activation]:
    return lambda: Activation(name)


ACTIVATION_RECORDERS: Mapping[Any, Recorder] = {
    F.leaky_relu: _recorder(_leaky_relu, 2),
    F.hardtanh: _recorder(_hardtanh, 3),
    F.relu6: _recorder(lambda inplace=False: Activation("hardtanh", 0.0, 6.0), 1),
    F.elu: _recorder(_elu, 2),
    F.gelu: _recorder(_gelu),
    F.softplus: _recorder(_softplus),
    **{getattr(F, name): _recorder(_plain(name), 1) for name in ("silu", "hardswish", "hardsigmoid")},
    **{
        getattr(module, name): _recorder(_without_arguments(name))
        for module in (torch, Tensor)
        for name in ("tanh", "sigmoid")
    },
    **{
        getattr(module, f"{name}_"): _recorder(_without_arguments(name), in_place=True)
        for module in (torch, Tensor)
        for name in ("tanh", "sigmoid")
    },
}
