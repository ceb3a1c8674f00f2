"""lightkit's cross-entropy behind the name of torch's, for code that knows nothing of lightkit."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
def substitute_cross_entropy() -> Iterator[None]:
    """Within it, :func:`torch.nn.functional.cross_entropy` runs on lightkit's kernels in this thread.

    However the function came to its caller: as an attribute of `torch.nn.functional`, imported by name, kept in
    an attribute or a `functools.partial`, or through :class:`torch.nn.CrossEntropyLoss`. Calls that the kernels
    do not cover, and those under torch.compile, torch.func, tracing or a dispatch mode, stay torch's. What
    torch.compile has compiled before is compiled once more. `torch.jit.script` cannot compile the function
    meanwhile. Contexts may be nested.

    Raises:
        RuntimeError: there is an `obstacle`.
    """
    # What changes is the code of the function, not the name in its module: an object that is not found under its
    # own name can no longer be pickled, and checkpoints with `loss=F.cross_entropy` among the hyperparameters
    # would fail. It also reaches every reference, wherever it is kept.
    if (cause := obstacle()) is not None:
        raise RuntimeError(f"torch.nn.functional.cross_entropy cannot be substituted: {cause}")
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


def obstacle() -> str | None:
    """Why torch's function cannot be substituted, or None."""
    if F.cross_entropy is not _function:
        module, name = getattr(F.cross_entropy, "__module__", "?"), getattr(F.cross_entropy, "__qualname__", "?")
        return f"it has been replaced by {module}.{name}"
    if _torch_cross_entropy is None:
        return f"torch {torch.__version__} defines it in another way"
    return None


def _entrance(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    # Its code runs with the global names of torch.nn.functional, so that it must import what it needs.
    from lightkit.ops.substitute import _choose

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
    # No recursion through the reference, which calls torch's function: where there is a kernel, it is not taken.
    if (
        # What torch.compile sees stays torch's: a compiled graph outlives this context.
        not torch.compiler.is_compiling()
        and _in_scope()
        and size_average is None
        and reduce is None
        and type(input) in _PLAIN
        and type(target) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        # Modes that watch torch's functions or operators, such as tracers, are to see torch's.
        and not has_torch_function_variadic(input, target)
        and not _is_dispatched_by_modes()
        and not torch.jit.is_tracing()
        and _has_dtypes_of_kernels(input, target, weight)
        and has_kernel(input, target, weight)
    ):
        return cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    return _torch_cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _has_dtypes_of_kernels(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Returns False for dtypes that torch refuses, and lightkit does not."""
    if target.is_floating_point():
        return weight is None or weight.is_floating_point()
    if target.dtype != torch.int64:
        return False
    if weight is None or weight.dtype == input.dtype:
        return True
    # Autocast makes all of them float32.
    return torch.is_autocast_enabled(input.device.type) and {weight.dtype, input.dtype} <= _AUTOCAST


def _is_dispatched_by_modes() -> bool:
    """Whether a mode decides on what operators do; one that only watches, as `lightkit.flops`, sees those that run."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return not all(getattr(mode, "only_watches", False) for mode in _get_current_dispatch_mode_stack())


def _in_scope() -> bool:
    """Whether this thread is within a context, or may work for one that is."""
    if threading.get_ident() in _threads:
        return True
    # Autograd's threads, which Python has not started, recompute what was checkpointed in the forward pass: both
    # must come from the same kernel. Every other thread is somebody else's.
    return isinstance(threading.current_thread(), threading._DummyThread)


def _copy_of_torchs() -> types.FunctionType | None:
    """A function with the code of torch's, or None if that is not what `_entrance` can take the place of."""
    if not isinstance(_function, types.FunctionType):
        return None
    code, own = _function.__code__, _entrance.__code__
    if code.co_freevars or _function.__module__ != F.__name__ or _parameters(code) != _parameters(own):
        return None
    return types.FunctionType(code, _function.__globals__, _function.__name__, _function.__defaults__)


def _parameters(code: types.CodeType) -> tuple[Any, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], code.co_argcount, code.co_flags & 0x0C


_function = F.cross_entropy
_torch_cross_entropy = _copy_of_torchs()
