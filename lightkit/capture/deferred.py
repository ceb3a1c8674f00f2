"""A tensor that stands for the result of operations that have not run yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightkit.capture.node import Node


class EscapeError(RuntimeError):
    """Reports that code in C++ received a deferred tensor, for which there is no value that autograd knows."""


class Deferred(Tensor):
    """A tensor of known shape and dtype, whose value is computed when a program needs it.

    Any function of torch that receives the object, except for those of `METADATA`, has the value computed first.
    `lightkit.capture.window.Window` computes it and turns the object into a plain :class:`torch.Tensor`: its class, its
    storage and its place in autograd's graph are then those of the result, and its ``id`` is the same.

    Args:
        node: the operation.
    """

    node: Node

    @staticmethod
    def __new__(cls, node: Node) -> Deferred:
        """Returns an object that stands for the value of ``node``."""
        handle = Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype)
        handle.node = node
        return handle

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes the values of all deferred arguments, and calls ``func`` with them.

        The mode of the capture comes first wherever it is active. This method serves the calls outside of it: those by
        torch's own functions in Python, and those after an error has ended a call of the module.
        """
        kwargs = kwargs or {}
        if func in METADATA:
            return read_metadata(func, args, kwargs)
        # Values stand in for the objects that could not be turned into tensors.
        args, kwargs = compute_all(args), compute_all(kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises an error: autograd has been passed, so that a value would have no gradient."""
        raise EscapeError(
            f"{func} got a tensor that is not computed yet from code that torch's functions do not pass through"
        )


# The attributes and methods that need no value. Getters of attributes are compared by value, not by identity.
_ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad"),
    *("is_cuda", "is_sparse", "is_quantized", "is_mps", "is_meta", "is_nested"),
)
_METHODS = (
    *("size", "dim", "numel", "nelement", "ndimension", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "__len__"),
)
METADATA = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
        *(getattr(Tensor, name) for name in _METHODS),
        *(torch.is_floating_point, torch.is_complex, torch.numel),
    }
)
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # pyright: ignore[reportAttributeAccessIssue]


def read_metadata(func: Any, args: Any, kwargs: Any) -> Any:
    """Returns the result of a function of `METADATA`, of which the first argument is deferred."""
    if func == _REQUIRES_GRAD:
        return args[0].node.requires_grad
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def compute_all(value: Any) -> Any:
    """Computes the deferred tensors in nested tuples, lists and dicts, and returns the same structure with tensors."""
    if isinstance(value, Deferred):
        return value.node.compute(value)
    if type(value) in (tuple, list):
        return type(value)(map(compute_all, value)) if any(_deferred_in(value)) else value
    if type(value) is dict:
        return {name: compute_all(item) for name, item in value.items()}
    return value


def _deferred_in(values: Any) -> Iterator[bool]:
    return (isinstance(value, (Deferred, tuple, list, dict)) for value in values)
