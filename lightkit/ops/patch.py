"""A patch of :func:`torch.nn.functional.cross_entropy`, for code that does not call lightkit."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function_variadic
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightkit.ops.cross_entropy import cross_entropy, has_kernel

_PLAIN = (Tensor, Parameter)
_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}

_lock = threading.Lock()
_threads: Counter[int] = Counter()


@contextmanager
def patch_cross_entropy() -> Iterator[None]:
    """Patches :func:`torch.nn.functional.cross_entropy` in this thread, so that it runs on lightkit's kernels.

    The patch reaches every reference to the function: an attribute of `torch.nn.functional`, an import by name, an
    attribute or a `functools.partial` that keeps it, :class:`torch.nn.CrossEntropyLoss`. Torch runs the calls that the
    kernels do not support, and the calls under torch.compile, torch.func, tracing or a TorchDispatchMode. torch.compile
    compiles again what it compiled before. `torch.jit.script` cannot compile the patched function. Contexts may be
    nested.

    Raises:
        RuntimeError: the function cannot be patched: see `unsupported_reason`.
    """
    # The patch changes the code of the function, not the name in its module: pickle rejects an object that is not found
    # under its own name, so that checkpoints with `loss=F.cross_entropy` among the hyperparameters would fail. A new
    # code also reaches every reference.
    if (reason := unsupported_reason()) is not None:
        raise RuntimeError(f"torch.nn.functional.cross_entropy cannot be patched: {reason}")
    assert _torch_cross_entropy is not None
    thread = threading.get_ident()
    with _lock:
        _threads[thread] += 1
        _function.__code__ = _entrance.__code__
    try:
        yield
    finally:
        with _lock:
            _threads[thread] -= 1
            if not _threads[thread]:
                del _threads[thread]
            if not _threads:
                _function.__code__ = _torch_cross_entropy.__code__


def unsupported_reason() -> str | None:
    """Returns the reason why :func:`torch.nn.functional.cross_entropy` cannot be patched; None if it can be."""
    if F.cross_entropy is not _function:
        module, name = getattr(F.cross_entropy, "__module__", "?"), getattr(F.cross_entropy, "__qualname__", "?")
        return f"it has been replaced by {module}.{name}"
    if _torch_cross_entropy is None:
        return f"torch {torch.__version__} defines it in another way"
    return None


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
    # The code runs with the global names of torch.nn.functional, so that it must import what it needs.
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
        # torch.compile sees torch's function: a compiled graph outlives the context.
        not torch.compiler.is_compiling()
        and _in_scope()
        and size_average is None
        and reduce is None
        and type(input) in _PLAIN
        and type(target) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        # Modes that watch torch's functions or operators, such as tracers, see torch's function.
        and not has_torch_function_variadic(input, target)
        and not _is_dispatched_by_modes()
        and not torch.jit.is_tracing()
        and _has_dtypes_of_kernels(input, target, weight)
        and has_kernel(input, target, weight)
    ):
        return cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    assert _torch_cross_entropy is not None
    return _torch_cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


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


def _is_dispatched_by_modes() -> bool:
    """Returns True if an active TorchDispatchMode may change what operators do.

    A mode with ``only_watches = True``, such as that of `lightkit.flops`, changes nothing and does not count.
    """
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return not all(getattr(mode, "only_watches", False) for mode in _get_current_dispatch_mode_stack())


def _in_scope() -> bool:
    """Returns True if this thread is within `patch_cross_entropy`, or is a thread of autograd."""
    if threading.get_ident() in _threads:
        return True
    # Autograd's threads, which Python did not start, recompute checkpointed parts of the forward pass: both must run on
    # the same kernel. Any other thread is not patched.
    return isinstance(threading.current_thread(), threading._DummyThread)


def _copy_of_torch_function() -> types.FunctionType | None:
    """Returns a function with torch's code; None if `_entrance` cannot replace that code."""
    if not isinstance(_function, types.FunctionType):
        return None
    code, own = _function.__code__, _entrance.__code__
    if code.co_freevars or _function.__module__ != F.__name__ or _parameters(code) != _parameters(own):
        return None
    return types.FunctionType(code, _function.__globals__, _function.__name__, _function.__defaults__)


def _parameters(code: types.CodeType) -> tuple[tuple[str, ...], int, int]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], code.co_argcount, code.co_flags & 0x0C


_function = F.cross_entropy
_torch_cross_entropy = _copy_of_torch_function()
