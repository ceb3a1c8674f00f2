"""Controls of torch's compiler that do not import the compiler; the import takes as long as that of torch.

`torch.compiler.assume_constant_result` and `torch.compiler.set_stance` import the compiler when they are called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, TypeVar

import torch

# The source file of `torch._disable_dynamo`, by which `undisguised` recognizes the wrappers that it makes.
_COMPILE_FILE = sys.modules["torch._compile"].__file__

_F = TypeVar("_F", bound=Callable[..., Any])


def assume_constant_result(function: _F) -> _F:
    """Marks ``function`` as one whose result `torch.compile` computes once and takes for a constant; returns it.

    `torch.compiler.assume_constant_result` sets the same mark.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def never_compile() -> AbstractContextManager[Any]:
    """Returns a context manager within which functions of `torch.compile` run without compilation."""
    # Nothing is compiled where nobody has imported the compiler.
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def undisguised(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a bound method without the wrapper by which torch excludes the method from compilation.

    A call of the wrapper would import the compiler. The function returns ``method`` unchanged if the compiler has been
    imported already, if ``method`` has no such wrapper, or if it is not a bound method.
    """
    if not isinstance(method, MethodType) or "torch._dynamo" in sys.modules:
        return method
    function = method.__func__
    wrapped = getattr(function, "__wrapped__", None)
    is_wrapper = getattr(getattr(function, "__code__", None), "co_filename", None) == _COMPILE_FILE
    return MethodType(wrapped, method.__self__) if is_wrapper and wrapped is not None else method
