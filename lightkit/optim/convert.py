"""Makes an optimizer of torch's one of lightkit's, in place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightkit.optim.adam import Adam, AdamW
from lightkit.optim.fused import FusedStep
from lightkit.optim.sgd import SGD

# Each class is derived from the one it replaces, has the same groups and state, and needs nothing that an __init__
# of its own would set: an optimizer can change from one to the other at any time between two steps.
REPLACEMENTS: dict[type[Optimizer], type[FusedStep]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}

# What they set in a step that torch's have no use for.
_LEFT_BEHIND = ("_plan", "_grad_norm", "skipped_steps")


def convert(optimizer: Optimizer) -> Callable[[], None]:
    """Makes an optimizer of torch's one of lightkit's, in place.

    It stays the same object, with its parameter groups, state and hooks: learning-rate schedulers, gradient
    scalers and whatever else refers to it need not know.

    Args:
        optimizer: one without an `obstacle`.

    Returns:
        A function that makes it torch's again; the state that has come together meanwhile stays.

    Raises:
        ValueError: it cannot be converted; says why.
    """
    if (cause := obstacle(optimizer)) is not None:
        raise ValueError(f"{type(optimizer).__name__} cannot be converted: {cause}")
    original = type(optimizer)
    _change_class(optimizer, REPLACEMENTS[original])
    return functools.partial(_revert, optimizer, original)


def obstacle(optimizer: Optimizer) -> str | None:
    """Why an optimizer cannot be converted, or None."""
    cls = type(optimizer)
    if cls not in REPLACEMENTS:
        if cls in REPLACEMENTS.values():
            return "it is lightkit's already"
        base = next((base for base in REPLACEMENTS if isinstance(optimizer, base)), None)
        if base is None:
            return "lightkit has no kernel for it"
        return f"it is a subclass of torch.optim.{base.__name__}, which may do something else"
    if not _has_own_step(optimizer):
        return "its method step has been replaced"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "differentiable=True, and autograd does not see the native step"
        for parameter in group["params"]:
            if is_traceable_wrapper_subclass(parameter):
                return f"it has parameters of type {type(parameter).__name__}, which the kernel does not take"
            if parameter.is_complex():
                return f"it has parameters of dtype {parameter.dtype}, which the kernel does not take"
    return None


def _revert(optimizer: Optimizer, original: type[Optimizer]) -> None:
    # One that was given another class or another step since is somebody else's to take apart.
    if type(optimizer) is REPLACEMENTS[original] and _has_own_step(optimizer):
        REPLACEMENTS[original].release(optimizer)
        _change_class(optimizer, original)
        for name in _LEFT_BEHIND:
            vars(optimizer).pop(name, None)


def _has_own_step(optimizer: Optimizer) -> bool:
    """Whether `step` is that of the class, be it wrapped by learning-rate schedulers."""
    step = vars(optimizer).get("step")
    return step is None or (_is_tracked(step) and step.__wrapped__ is type(optimizer).step)


def _is_tracked(step: Any) -> bool:
    return hasattr(step, "_wrapped_by_lr_sched") and hasattr(step, "__wrapped__")


def _change_class(optimizer: Optimizer, cls: type[Optimizer]) -> None:
    optimizer.__class__ = cls
    # Once for every class: profiling and the hooks around a step, which Optimizer.__init__ sees to.
    optimizer._patch_step_function()
    if "step" in vars(optimizer):
        optimizer.step = _tracked(optimizer, cls.step)


def _tracked(optimizer: Optimizer, step: Callable) -> Callable:
    """`step` as learning-rate schedulers wrap it, to be warned if they are stepped before the optimizer.

    Theirs is bound to the function that the class had when they were made.
    """
    reference = weakref.ref(optimizer)

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        owner._opt_called = True
        return step.__get__(owner, type(owner))(*args, **kwargs)

    wrapper._wrapped_by_lr_sched = True
    return wrapper
