"""An operation that has been recorded and not run."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightkit.capture.window import Window


class Node:
    """An operation of torch with its arguments, and its value once it has run.

    Args:
        kind: the name of the operation, a key of `lightkit.capture.torch_functions.TORCH`.
        operands: the data that the operation computes with: other operations, or tensors.
        tensors: the parameters and buffers, such as weight and bias; None for those that are not given.
        settings: the other arguments.
        shape: the shape of the value.
        dtype: the dtype of the value.
        requires_grad: True if the value takes part in autograd's graph.
        seed: the seed of a random operation.

    Attributes:
        key: a number for `describe`, set by `lightkit.capture.calls.Calls`.
        index: the place among the operations of its window.
        window: the operations that wait with this one; None once the value is known.
        handle: the object of the program that stands for the value, while the operation runs; None for none.
        value: the value; None until it is known, and for a value that nobody needed.
    """

    __slots__ = (
        *("kind", "operands", "tensors", "settings", "shape", "dtype", "requires_grad", "seed"),
        *("handle", "index", "key", "value", "window"),
    )

    def __init__(
        self,
        kind: str,
        operands: tuple[Operand, ...],
        tensors: tuple[Tensor | None, ...],
        settings: tuple[Any, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        requires_grad: bool,
        seed: Tensor | None = None,
    ) -> None:
        self.kind, self.operands, self.tensors, self.settings = kind, operands, tensors, settings
        self.shape, self.dtype, self.requires_grad, self.seed = shape, dtype, requires_grad, seed
        self.index = -1
        self.handle: Tensor | None = None
        self.value: Tensor | None = None
        self.window: Window | None = None
        self.key = -1

    def describe(self) -> tuple[Any, ...]:
        """Returns what decides how the operation runs: its kind, settings, shapes, and the places of its operands."""
        return (
            self.kind,
            self.settings,
            self.shape[1:],
            self.dtype,
            self.requires_grad,
            _keys(self.operands),
            tuple([None if t is None else (t.shape, t.requires_grad, is_channels_last(t)) for t in self.tensors]),
        )

    def on(self, operands: tuple[Operand, ...], tensors: tuple[Tensor | None, ...], seed: Tensor | None) -> Node:
        """Returns the same operation on other data of the same shapes, dtypes and memory formats."""
        node = Node(self.kind, operands, tensors, self.settings, self.shape, self.dtype, self.requires_grad, seed)
        node.key = self.key
        return node

    def operand(self, index: int = 0) -> Tensor:
        """Returns the value of an operand, which has been computed."""
        operand = self.operands[index]
        value = operand.value if isinstance(operand, Node) else operand
        assert value is not None
        return value

    def finish(self, value: Tensor) -> None:
        """Sets the value, and turns the object of the program that stands for it into this tensor.

        Torch can exchange two objects only before anything else refers to the memory of the value.
        """
        self.value, handle, self.handle = value, self.handle, None
        if handle is not None:
            # A weak reference to the object prevents the exchange: torch's functions then exchange it in each call.
            with suppress(RuntimeError):
                torch.utils.swap_tensors(handle, value)
                self.value = handle

    def compute(self, handle: Any) -> Tensor:
        """Returns the value for the object that stands for it, and computes it first if need be."""
        if self.window is not None:
            self.window.compute()
        if self.value is None:
            raise RuntimeError("the operations of this tensor have failed")
        return self.value


Operand: TypeAlias = Node | Tensor


def _keys(operands: tuple[Operand, ...]) -> tuple[Any, ...]:
    return tuple(
        [
            operand.index
            if isinstance(operand, Node)
            else (operand.shape[1:], operand.requires_grad, is_channels_last(operand))
            for operand in operands
        ]
    )


def is_channels_last(tensor: Tensor) -> bool:
    """Returns True if torch's convolution takes the memory of a tensor for channels-last.

    For sizes of 1 the strides decide, as in torch's ``suggest_memory_format``.
    """
    return tensor.dim() == 4 and _are_channels_last(tensor.shape, tensor.stride())


@lru_cache(maxsize=1024)
def _are_channels_last(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    least = 0
    for dim in (1, 3, 2, 0):
        if strides[dim] < least or (dim == 0 and least == strides[1]) or strides[1] == 0:
            return False
        least = strides[dim] * max(sizes[dim], 1)
    return True
