"""Checks whether a call of a module does nothing but what the class of the module says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


def are_all_hooked() -> bool:
    """Returns True if torch has a hook that it calls for every module."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, is_known: Callable[[Any], bool] = lambda hook: False) -> bool:
    """Returns True if a module is not compiled, and has neither hooks nor a ``forward`` of its own.

    Args:
        module: the module.
        is_known: returns True for a forward pre-hook that does not count.
    """
    return is_unhooked(module, is_known) and module.__dict__.get("_compiled_call_impl") is None


def is_unhooked(module: nn.Module, is_known: Callable[[Any], bool] = lambda hook: False) -> bool:
    """Returns True if a module has neither hooks nor a ``forward`` of its own; it may be compiled: see `is_plain`."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or not all(map(is_known, own["_forward_pre_hooks"].values()))
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
