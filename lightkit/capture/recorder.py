"""The interface of the functions that record calls of torch, and the settings under which they record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lightkit.capture.deferred import Deferred
from lightkit.capture.node import Node


class Context(NamedTuple):
    """The settings of torch that an operation runs under.

    Attributes:
        grad: True if autograd records.
        inference: True in inference mode.
        autocast: the dtype of autocast on a CPU; None if autocast is off.
    """

    grad: bool
    inference: bool
    autocast: torch.dtype | None


def current_settings() -> tuple[bool, bool, torch.dtype | None]:
    """Returns the fields of the `Context` of this thread, as a plain tuple: each call of a function compares them."""
    return _is_grad_enabled(), _is_inference(), torch.get_autocast_dtype("cpu") if _is_autocast("cpu") else None


_is_grad_enabled, _is_inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_is_autocast = torch.is_autocast_enabled


class Recorder(NamedTuple):
    """The way to record the calls of a function of torch.

    Attributes:
        record: takes the context and the arguments of a call, and returns the operation; None if the call cannot wait;
            the deferred argument itself if the function returns its argument.
        in_place: True if the function writes the result to its first argument.
        inplace_at: the position of the argument ``inplace``, which tells the same; None for none.
    """

    record: Callable[..., Node | Deferred | None]
    in_place: bool = False
    inplace_at: int | None = None

    def writes(self, args: Any, kwargs: Any) -> bool:
        """Returns True if a call with these arguments writes the result to its first argument."""
        if self.inplace_at is None:
            return self.in_place
        return bool(args[self.inplace_at] if len(args) > self.inplace_at else kwargs.get("inplace"))


def requires_grad(context: Context, *tensors: Any) -> bool:
    """Returns True if the result of an operation on these tensors takes part in autograd's graph."""
    if context.grad:
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
