"""A patch of :func:`torch.nn.functional.cross_entropy`, for code that does not call lightkit."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import Parameter

from lightkit.ops._code_patch import CodePatch
from lightkit.ops.cross_entropy import cross_entropy, has_kernel

_PLAIN = (Tensor, Parameter)
_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}


def patch_cross_entropy() -> AbstractContextManager[None]:
    """Patches :func:`torch.nn.functional.cross_entropy` in this thread, so that it runs on lightkit's kernels.

    The patch reaches every reference to the function: an attribute of `torch.nn.functional`, an import by name, an
    attribute or a `functools.partial` that keeps it, :class:`torch.nn.CrossEntropyLoss`. Torch runs the calls that the
    kernels do not support, and the calls under torch.compile, torch.func, tracing or a TorchDispatchMode. torch.compile
    compiles again what it compiled before. `torch.jit.script` cannot compile the patched function. Contexts may be
    nested.

    Returns:
        The context within which the function is patched. To enter it raises a RuntimeError if the function cannot be
        patched: ``PATCH.unsupported_reason()`` tells the reason.
    """
    return PATCH.applied()


def _entrance(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    from lightkit.ops.patch import _choose

    return _choose(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _choose(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    # The reference calls torch's function. There is no recursion: a call with a kernel does not take the reference.
    if (
        PATCH.applies_to(input, target)
        and size_average is None
        and reduce is None
        and type(input) in _PLAIN
        and type(target) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        and _has_dtypes_of_kernels(input, target, weight)
        and has_kernel(input, target, weight)
    ):
        return cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    return PATCH.torchs_function(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _has_dtypes_of_kernels(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Returns True if class indices are int64, and torch accepts the dtypes of ``target`` and ``weight``.

    Class indices need a weight of the dtype of ``input``, except under autocast, which casts both to float32. Class
    probabilities take a weight of any floating dtype. Torch gets the other calls: it raises an error for most of them,
    and computes the loss of uint8 indices.
    """
    if target.is_floating_point():
        return weight is None or weight.is_floating_point()
    if target.dtype != torch.int64:
        return False
    if weight is None or weight.dtype == input.dtype:
        return True
    # Autocast casts all of them to float32.
    return torch.is_autocast_enabled(input.device.type) and {weight.dtype, input.dtype} <= _AUTOCAST


PATCH = CodePatch("cross_entropy", _entrance)
