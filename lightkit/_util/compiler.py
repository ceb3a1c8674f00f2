"""Speaks to torch's compiler without importing it, which takes as long as importing torch.

`torch.compiler.assume_constant_result` and `torch.compiler.set_stance` import it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

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
