"""Exchanges the code of a function of torch in some threads, so that every reference to the function is patched."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_variadic
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class CodePatch:
    """A patch of a function of `torch.nn.functional`.

    The patch changes the code of the function, not the name in its module: pickle rejects an object that is not found
    under its own name, so that checkpoints with `loss=F.cross_entropy` among the hyperparameters would fail. A new code
    also reaches every reference.

    Args:
        name: the name of the function.
        entrance: the function whose code replaces torch's. It has the parameters of torch's function. Its code runs
            with the global names of `torch.nn.functional`, so that it must import what it needs.

    Attributes:
        torchs: a function with torch's code; None if ``entrance`` cannot replace that code.
        threads: the threads within the contexts of `applied`, with the number of contexts.
    """

    def __init__(self, name: str, entrance: Callable[..., Any]) -> None:
        assert isinstance(entrance, types.FunctionType)
        self._name, self._entrance = name, entrance
        self._function = getattr(F, name)
        self._lock = threading.Lock()
        self.threads: Counter[int] = Counter()
        self.torchs = self._copy_of_torchs()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Patches the function in this thread; contexts may be nested.

        Raises:
            RuntimeError: the function cannot be patched.
        """
        if (reason := self.unsupported_reason()) is not None:
            raise RuntimeError(f"torch.nn.functional.{self._name} cannot be patched: {reason}")
        assert self.torchs is not None
        thread = threading.get_ident()
        with self._lock:
            self.threads[thread] += 1
            self._function.__code__ = self._entrance.__code__
        try:
            yield
        finally:
            with self._lock:
                self.threads[thread] -= 1
                if not self.threads[thread]:
                    del self.threads[thread]
                if not self.threads:
                    self._function.__code__ = self.torchs.__code__

    def unsupported_reason(self) -> str | None:
        """Returns the reason why the function cannot be patched; None if it can be."""
        found = getattr(F, self._name)
        if found is not self._function:
            module, name = getattr(found, "__module__", "?"), getattr(found, "__qualname__", "?")
            return f"it has been replaced by {module}.{name}"
        if self.torchs is None:
            return f"torch {torch.__version__} defines it in another way"
        return None

    def applies_to(self, *arguments: Any) -> bool:
        """Returns True if lightkit may compute a call with these tensors in this thread.

        Compilers, tracers and modes that watch torch's functions or operators see torch's function.
        """
        return not is_watched() and self._is_in_scope() and not has_torch_function_variadic(*arguments)

    def torchs_function(self, *args: Any) -> Any:
        """Calls torch's function."""
        assert self.torchs is not None
        return self.torchs(*args)

    def _is_in_scope(self) -> bool:
        """Returns True if this thread is within a context of the patch, or is a thread of autograd."""
        if threading.get_ident() in self.threads:
            return True
        # Autograd's threads, which Python did not start, recompute checkpointed parts of the forward pass: both must
        # run on the same kernel. Any other thread is not patched.
        return isinstance(threading.current_thread(), threading._DummyThread)

    def _copy_of_torchs(self) -> types.FunctionType | None:
        function = self._function
        if not isinstance(function, types.FunctionType):
            return None
        code, own = function.__code__, self._entrance.__code__
        if code.co_freevars or function.__module__ != F.__name__ or _parameters(code) != _parameters(own):
            return None
        return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def _parameters(code: types.CodeType) -> tuple[tuple[str, ...], int, int]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], code.co_argcount, code.co_flags & 0x0C


def is_watched() -> bool:
    """Returns True if a compiler, a tracer or a TorchDispatchMode must see torch's function."""
    # torch.compile sees torch's function: a compiled graph outlives the context of a patch.
    return torch.compiler.is_compiling() or is_dispatched_by_modes() or torch.jit.is_tracing()


def is_dispatched_by_modes() -> bool:
    """Returns True if an active TorchDispatchMode may change what operators do.

    A mode with ``only_watches = True``, such as that of `lightkit.flops`, changes nothing and does not count.
    """
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return not all(getattr(mode, "only_watches", False) for mode in _get_current_dispatch_mode_stack())
