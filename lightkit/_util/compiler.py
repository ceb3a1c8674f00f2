"""Speaks to torch's compiler without importing it, which takes as long as importing torch.

`torch.compiler.assume_constant_result` and `torch.compiler.set_stance` import it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable)


def assume_constant_result(function: _F) -> _F:
    """Marks a function as one that `torch.compile` calls once, as `torch.compiler.assume_constant_result` does."""
    function._dynamo_marked_constant = True
    return function


def never_compile() -> AbstractContextManager:
    """Returns a context in which what was compiled runs as it was written."""
    # Nothing is compiled where nobody has imported the compiler.
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def undisguised(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a bound method without the wrapper by which torch hides it from its compiler, while there is none.

    The wrapper imports the compiler in order to hide from it.
    """
    function = getattr(method, "__func__", None)
    is_wrapper = getattr(getattr(function, "__code__", None), "co_filename", None) == torch._compile.__file__
    if not is_wrapper or "torch._dynamo" in sys.modules:
        return method
    return MethodType(function.__wrapped__, method.__self__)
