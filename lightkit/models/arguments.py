"""A class decorator that keeps the arguments of a model, from which a checkpoint describes the model."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=type[nn.Module])


def keeps_arguments(cls: M) -> M:
    """Makes the instances of ``cls`` keep their arguments by name, defaults included, as the dict ``hyperparameters``.

    An instance of a subclass keeps the arguments with which its class has called ``__init__`` of ``cls``.
    """
    init: Any = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def initialize(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *names = bound.arguments
        vars(self)["hyperparameters"] = {name: bound.arguments[name] for name in names}

    # A type checker does not see that the wrapper has the signature of `init`.
    setattr(cls, "__init__", initialize)  # noqa: B010
    return cls
