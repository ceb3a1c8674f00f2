"""Checks of the arguments of torch's functions, for the recorders of their calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Operand
from lightkit.capture.recorder import Context

_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, Parameter)


def as_operand(tensor: Any) -> Operand | None:
    """Returns what an operation computes with; None if the kernels do not take it."""
    if type(tensor) is Deferred:
        return tensor.node
    if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.layout is not torch.strided:
        return None
    return tensor if tensor.dtype in _DTYPES and tensor.numel() > 0 else None


def are_plain(dtype: torch.dtype, *tensors: Any) -> bool:
    """Returns True for dense tensors of a dtype on a CPU; None stands for a tensor that is not given."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.dtype != dtype or not t.is_cpu or t.layout is not torch.strided:
            return False
    return True


def find_product_dtype(context: Context, operand: Operand, weight: Any, bias: Any) -> torch.dtype | None:
    """Returns the dtype of a product with a weight.

    Returns:
        None if torch would not compute it, or not cast as expected, or if no kernel takes weight and bias.
    """
    if not are_plain(weight.dtype, weight, bias) or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    if context.autocast is None:
        return operand.dtype if weight.dtype == operand.dtype else None
    if weight.dtype != torch.float32 or operand.dtype not in (torch.float32, context.autocast):
        return None
    return context.autocast


def as_pair(value: Any, is_sequence: bool = False, of_height: int = 1) -> tuple[int, int] | None:
    """Returns a setting for the height and the width of images.

    Args:
        value: the setting: a number, or a tuple or list of numbers.
        is_sequence: True for a setting of sequences, one number for their length. They are images of height 1.
        of_height: the setting for the height of sequences.

    Returns:
        None if ``value`` is no such setting.
    """
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(numbers) <= (1 if is_sequence else 2) or not all(map(_is_integer, numbers)):
        return None
    return of_height if is_sequence else numbers[0], numbers[-1]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_hashable(value: Any) -> Any:
    """Returns a list as a tuple, and any other value as it is."""
    return tuple(value) if type(value) is list else value
