"""Decides whether a call runs on a native kernel or on the reference in torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightkit import native
from lightkit._util.compiler import assume_constant_result

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def check_reduction(reduction: str) -> None:
    """Raises a ValueError unless ``reduction`` is ``"none"``, ``"mean"`` or ``"sum"``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def kernels_apply(*tensors: Tensor) -> bool:
    """Returns True if the kernels support the dtype and device of the first tensor, and nothing rules them out.

    Forward-mode AD, torch.func and tensor subclasses with a dispatch of their own, such as DTensor, rule kernels out.
    """
    input = tensors[0]
    return (
        input.dtype in DTYPES
        and _native_available(input.device.type)
        # Forward-mode AD and the transforms of torch.func cannot see through an autograd function in C++.
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        # DTensor and similar subclasses have a dispatch of their own, which does not know the ops.
        and all(type(t) in (Tensor, Parameter) or not is_traceable_wrapper_subclass(t) for t in tensors)
    )


def is_autocast(input: Tensor) -> bool:
    """Returns True if autocast casts ``input`` to its dtype: on its device, and floating point except float64."""
    return input.is_floating_point() and input.dtype != torch.float64 and is_autocast_device(input.device.type)


def is_autocast_device(device_type: str) -> bool:
    """Returns True if autocast is enabled for ``device_type``, such as ``"cuda"``; ``"meta"`` has no autocast."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


@assume_constant_result
def _native_available(device_type: str) -> bool:
    return native.available(device_type)
