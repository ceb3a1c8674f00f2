"""Has an optimizer of torch's step on lightkit's kernels, in place."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightkit._util.originals import Originals
from lightkit.optim.adam import Adam, AdamW
from lightkit.optim.fused import FusedStep, is_watched
from lightkit.optim.sgd import SGD

# Each class has the groups and the state of the one whose steps it takes.
REPLACEMENTS: dict[type[Optimizer], type[FusedStep]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}

# What a step of torch's calls. torch.optim does not keep the names of its modules.
_MODULES = types.SimpleNamespace(
    sgd=sys.modules["torch.optim.sgd"], adam=sys.modules["torch.optim.adam"], own=torch.optim
)
_METHODS = ("step", "_init_group", "_optimizer_step_code")
_FUNCTIONS = {torch.optim.SGD: "sgd.sgd", torch.optim.Adam: "adam.adam", torch.optim.AdamW: "adam.adam"}

_conversions: weakref.WeakKeyDictionary[Optimizer, _Conversion] = weakref.WeakKeyDictionary()


def convert(optimizer: Optimizer) -> Callable[[], None]:
    """Has an optimizer of torch's take its steps on lightkit's kernels.

    It stays the same object of the same class, with its parameter groups, state and hooks: learning-rate schedulers,
    gradient scalers and whatever else refers to it need not know. All that it gets is an attribute ``step`` of its own.
    Copies and pickles of it are torch's. Where somebody patches ``step`` on its class, or what torch's step calls, that
    is called; so is torch's step under torch.compile.

    Args:
        optimizer: one without an `obstacle`.

    Returns:
        A function that ends it; the state that has come together meanwhile stays, as torch's class has it.

    Raises:
        ValueError: it cannot be converted; says why.
    """
    if (cause := obstacle(optimizer)) is not None:
        raise ValueError(f"{type(optimizer).__name__} cannot be converted: {cause}")
    conversion = _conversions[optimizer] = _Conversion(optimizer)
    return functools.partial(conversion.revert, weakref.ref(optimizer))


def is_converted(optimizer: Optimizer) -> bool:
    """Returns True between `convert` and its end."""
    return optimizer in _conversions


def obstacle(optimizer: Optimizer) -> str | None:
    """Returns why an optimizer cannot be converted, or None."""
    cls = type(optimizer)
    if cls not in REPLACEMENTS:
        if cls in REPLACEMENTS.values():
            return "it is lightkit's already"
        base = next((base for base in REPLACEMENTS if isinstance(optimizer, base)), None)
        if base is None:
            return "lightkit has no kernel for it"
        return f"it is a subclass of torch.optim.{base.__name__}, which may do something else"
    if is_converted(optimizer):
        return "it is on lightkit's kernels already"
    if not _has_step_of(optimizer, cls.step):
        return "its method step has been replaced"
    if not _called(cls).are_in_place():
        return f"step of torch.optim.{cls.__name__}, or what it calls, has been replaced"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "differentiable=True, and autograd does not see the native step"
        for parameter in group["params"]:
            if is_traceable_wrapper_subclass(parameter):
                return f"it has parameters of type {type(parameter).__name__}, which the kernel does not take"
            if parameter.is_complex():
                return f"it has parameters of dtype {parameter.dtype}, which the kernel does not take"
    return None


class _Conversion:
    """Takes the steps of one optimizer. It does not keep the optimizer alive."""

    def __init__(self, optimizer: Optimizer) -> None:
        cls = type(optimizer)
        self._class = cls
        # Never initialized: it has no groups of its own, and of each option what its class says.
        self._kernels = REPLACEMENTS[cls].__new__(REPLACEMENTS[cls])
        self._called = _called(cls)
        self._is_on = True
        self._loaded: dict[str, Any] = {}
        self._handles = [
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

        # A function, as schedulers that are made later want to wrap one.
        @functools.wraps(cls.step)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self.step(optimizer, *args, **kwargs)

        self._function = step
        is_tracked = "step" in vars(optimizer)
        optimizer.step = _tracked(optimizer, step) if is_tracked else _Method(optimizer, step)
        # Asked for by copies and pickles.
        optimizer.__getstate__ = _Method(optimizer, self._state_as_torch_has_it)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Takes a step on the kernels; or calls the class's, where that is not torch's any more, and after the end."""
        if not self._is_on or not self._called.are_in_place() or torch.compiler.is_compiling():
            self._kernels.release(optimizer.state)
            return type(optimizer).step(optimizer, *args, **kwargs)
        if is_watched(optimizer):
            return Optimizer.profile_hook_step(self._kernels.step_for)(optimizer, *args, **kwargs)
        return self._kernels.step_for(optimizer, *args, **kwargs)

    def revert(self, reference: weakref.ref[Optimizer]) -> None:
        """Makes the optimizer torch's again. A step that somebody else has wrapped stays, and leads to torch's."""
        optimizer = reference()
        if optimizer is None or not self._is_on:
            return
        self._is_on = False
        del _conversions[optimizer]
        for handle in self._handles:
            handle.remove()
        self._kernels.release(optimizer.state)
        vars(optimizer).pop("__getstate__", None)
        if _has_step_of(optimizer, self._function):
            own = vars(optimizer).pop("step")
            if _is_tracked(own):
                optimizer.step = _tracked(optimizer, type(optimizer).step)

    def _state_as_torch_has_it(self, optimizer: Optimizer) -> dict[str, Any]:
        state = type(optimizer).__getstate__(optimizer)
        copied = defaultdict(dict, {parameter: dict(entry) for parameter, entry in state["state"].items()})
        self._kernels.release(copied)
        return {**state, "state": copied}

    def _before_loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _after_loading(self, optimizer: Optimizer) -> None:
        self._kernels.restore_unrounded(optimizer, self._loaded)
        self._loaded = {}


class _Method:
    """Stands for a method bound to an optimizer that does not keep the optimizer alive."""

    def __init__(self, optimizer: Optimizer, function: Callable[..., Any]) -> None:
        self._reference = weakref.ref(optimizer)
        self.__func__ = function
        self.__name__, self.__qualname__, self.__doc__ = function.__name__, function.__qualname__, function.__doc__

    @property
    def __self__(self) -> Optimizer | None:
        return self._reference()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(self.__func__, self))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self._reference(), *args, **kwargs)


def _called(cls: type[Optimizer]) -> Originals:
    methods = (f"own.{cls.__name__}.{name}" for name in _METHODS)
    return Originals((torch,), _MODULES, *methods, _FUNCTIONS[cls])


def _has_step_of(optimizer: Optimizer, function: Callable[..., Any]) -> bool:
    """Returns True if the optimizer's own ``step`` is `function`, be it wrapped by learning-rate schedulers."""
    step = vars(optimizer).get("step")
    if isinstance(step, _Method):
        return step.__func__ is function
    return (step is None and function is type(optimizer).step) or (_is_tracked(step) and step.__wrapped__ is function)


def _is_tracked(step: Any) -> bool:
    return hasattr(step, "_wrapped_by_lr_sched") and hasattr(step, "__wrapped__")


def _tracked(optimizer: Optimizer, step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `step` as learning-rate schedulers wrap it, to warn where they are stepped before the optimizer.

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
