"""Controls torch's compiler without importing it: the import takes as long as that of torch.

`torch.compiler.assume_constant_result` and `torch.compiler.set_stance` import it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, TypeVar

import torch

# The file of the wrapper.
_COMPILE_FILE = sys.modules["torch._compile"].__file__

_F = TypeVar("_F", bound=Callable[..., Any])


def assume_constant_result(function: _F) -> _F:
    """Marks a function as one that `torch.compile` calls once, as `torch.compiler.assume_constant_result` does."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def never_compile() -> AbstractContextManager[Any]:
    """Returns a context in which compiled functions run uncompiled."""
    # Nothing is compiled where nobody has imported the compiler.
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def undisguised(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a bound method without the wrapper by which torch hides the method from its compiler.

    The wrapper would import the compiler. Once the compiler has been imported, the method is returned as it is.
    """
    if not isinstance(method, MethodType) or "torch._dynamo" in sys.modules:
        return method
    function = method.__func__
    wrapped = getattr(function, "__wrapped__", None)
    is_wrapper = getattr(getattr(function, "__code__", None), "co_filename", None) == _COMPILE_FILE
    return MethodType(wrapped, method.__self__) if is_wrapper and wrapped is not None else method
