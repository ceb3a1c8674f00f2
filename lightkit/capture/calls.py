"""Calls of torch's functions that have occurred before, recorded again without a look at what they mean.

A program calls the same functions on tensors of the same shapes in every step. To compare a call with that of the step
before takes about half of the time of translating it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node
from lightkit.ops.dropout import draw_seed

if TYPE_CHECKING:
    from lightkit.capture.recorder import Context
    from lightkit.capture.window import Window

_TENSORS = (Tensor, Parameter)
_CONSTANTS = (type(None), bool, int, float, str)

# A call is a few small objects. The limits keep a program whose calls never repeat from growing.
_MAX_CALLS = 4096
_MAX_KEYS = 4096


class Call:
    """A call of a function, with the operation that it is.

    Args:
        function: the function of torch.
        values: the arguments, positional and then named.
        names: the names of the named ones.
        operation: the operation of the call, without its data.
        operands: the places of its operands among ``values``.
        tensors: the places of its parameters and buffers; None for those that are not given.

    Attributes:
        next: the call that came after this one the last time; None for none.
    """

    __slots__ = ("_expected", "_function", "_names", "_operands", "_operation", "_tensors", "_types", "next")

    def __init__(
        self,
        function: Callable[..., Any],
        values: Sequence[Any],
        names: tuple[str, ...],
        operation: Node,
        operands: tuple[int, ...],
        tensors: tuple[int | None, ...],
    ) -> None:
        self._function, self._names, self._operation = function, names, operation
        self._operands, self._tensors = operands, tensors
        self._types = tuple(map(type, values))
        self._expected = tuple(map(_description, values))
        self.next: Call | None = None

    def repeat(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], window: Window
    ) -> Node | None:
        """Returns the operation of a call in ``window`` if it is this call on other data; otherwise None."""
        if function is not self._function or len(args) + len(kwargs) != len(self._types):
            return None
        values = args
        if kwargs or self._names:
            if tuple(kwargs) != self._names:
                return None
            values = (*args, *kwargs.values())
        for value, expected, cls in zip(values, self._expected, self._types, strict=True):
            if type(value) is not cls:
                return None
            if cls is Deferred:
                if value.node.window is not window or _description(value) != expected:
                    return None
            elif cls in _TENSORS:
                if _description(value) != expected:
                    return None
            elif value is not expected and value != expected:
                return None
        operation = self._operation
        operands = tuple([value.node if type(value := values[i]) is Deferred else value for i in self._operands])
        tensors = tuple([None if i is None else values[i] for i in self._tensors])
        seed = None if operation.seed is None else draw_seed()
        return operation.on(operands, tensors, seed)


def _description(value: Any) -> Any:
    """Returns what must be equal in an argument of the same call."""
    if type(value) is Deferred:
        # The key says all but the size of the batch.
        return value.node.index, value.node.key, value.node.shape
    if type(value) in _TENSORS:
        strides = value.stride() if value.layout is torch.strided else None
        return value.shape, value.dtype, value.requires_grad, strides, value.is_cpu
    return value


class Calls:
    """The calls that a capture knows."""

    def __init__(self) -> None:
        self._first: dict[Any, Call] = {}
        # The number of calls since `_first` was empty.
        self._count = 0
        self._keys: dict[Any, int] = {}
        self._numbers = count()

    def after(
        self, last: Call | None, context: Context, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Call | None:
        """Returns the call that is expected after ``last``, or as the first one with these arguments; None for none."""
        return self._first.get(_start(context, function, args)) if last is None else last.next

    def remember(
        self,
        last: Call | None,
        context: Context,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        node: Node,
    ) -> Call | None:
        """Sets the key of a call's new operation, and expects the call after ``last`` from now on.

        Returns:
            The call; None if its arguments cannot be compared with those of another.
        """
        node.key = self._key(node.describe())
        call = _as_call(function, args, kwargs, node)
        if call is None:
            return None
        self._count += 1
        if self._count > _MAX_CALLS:
            self._first.clear()
            self._count = 0
        if last is not None:
            last.next = call
        else:
            self._first[_start(context, function, args)] = call
        return call

    def _key(self, description: Any) -> int:
        """Returns a number for a description: equal ones have the same, and no two others do."""
        key = self._keys.get(description)
        if key is None:
            if len(self._keys) >= _MAX_KEYS:
                self._keys.clear()
            key = self._keys[description] = next(self._numbers)
        return key


def _as_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], node: Node) -> Call | None:
    """Returns a call, of which ``node`` is the operation; None if its arguments cannot be compared with another's.

    They cannot for a list, which may change in place, for a tensor whose value is a setting, and for a tensor in two
    places, in which there may be two tensors the next time.
    """
    values = (*args, *kwargs.values())
    places: dict[int, int] = {}
    for i, value in enumerate(values):
        if type(value) is Deferred:
            places[id(value.node)] = i
        elif type(value) in _TENSORS:
            if id(value) in places:
                return None
            places[id(value)] = i
        elif not _is_constant(value):
            return None
    operands = tuple(places.get(id(operand), -1) for operand in node.operands)
    tensors = tuple(None if tensor is None else places.get(id(tensor), -1) for tensor in node.tensors)
    if -1 in operands or -1 in tensors or not {*operands, *tensors}.issuperset(places.values()):
        return None
    return Call(function, values, tuple(kwargs), node.on((), (), node.seed), operands, tensors)


def _start(context: Context, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # Several modules may begin with the same function: the second argument is often a parameter.
    return context, function, id(args[1]) if len(args) > 1 else None


def _is_constant(value: Any) -> bool:
    return type(value) in _CONSTANTS or (type(value) is tuple and all(map(_is_constant, value)))
