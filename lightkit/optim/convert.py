"""Conversion of torch's optimizers, in place, to steps on lightkit's kernels."""

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
from lightkit.optim.fused import FusedStep, is_observed
from lightkit.optim.sgd import SGD

# The class of torch, and the class of lightkit with the same groups and state that takes its steps.
REPLACEMENTS: dict[type[Optimizer], type[FusedStep]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}

# The functions that torch's step calls. torch.optim deletes the names of its modules.
_MODULES = types.SimpleNamespace(
    sgd=sys.modules["torch.optim.sgd"], adam=sys.modules["torch.optim.adam"], own=torch.optim
)
_METHODS = ("step", "_init_group", "_optimizer_step_code")
_FUNCTIONS = {torch.optim.SGD: "sgd.sgd", torch.optim.Adam: "adam.adam", torch.optim.AdamW: "adam.adam"}

_conversions: weakref.WeakKeyDictionary[Optimizer, _Conversion] = weakref.WeakKeyDictionary()


def convert(optimizer: Optimizer) -> Callable[[], None]:
    """Makes an optimizer of torch take its steps on lightkit's kernels, in place.

    The optimizer keeps its identity, class, parameter groups, state and hooks, so that learning-rate schedulers and
    gradient scalers keep working. It gets the attributes ``step`` and ``__getstate__``. Copies and pickles are torch's.
    If ``step`` of its class or a function that torch's step calls is patched, the patch is called; under torch.compile
    torch's step is.

    Args:
        optimizer: an optimizer for which `unsupported_reason` returns None.

    Returns:
        A function that ends the conversion; the state stays, in the form of torch's class.

    Raises:
        ValueError: the optimizer cannot be converted; the message says why.
    """
    if (reason := unsupported_reason(optimizer)) is not None:
        raise ValueError(f"{type(optimizer).__name__} cannot be converted: {reason}")
    conversion = _conversions[optimizer] = _Conversion(optimizer)
    return functools.partial(conversion.revert, weakref.ref(optimizer))


def is_converted(optimizer: Optimizer) -> bool:
    """Returns True while ``optimizer`` is converted: from `convert` to a call of the function that it returned."""
    return optimizer in _conversions


def unsupported_reason(optimizer: Optimizer) -> str | None:
    """Returns the reason why ``optimizer`` cannot be converted; None if it can be."""
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
    if not _step_functions(cls).are_in_place():
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
    """The conversion of one optimizer: takes the steps of the optimizer, without keeping the optimizer alive."""

    def __init__(self, optimizer: Optimizer) -> None:
        cls = type(optimizer)
        self._class = cls
        # Not initialized: it has no groups, and the class attributes as options.
        self._kernels = REPLACEMENTS[cls].__new__(REPLACEMENTS[cls])
        self._step_functions = _step_functions(cls)
        self._is_active = True
        self._loaded: dict[str, Any] = {}
        self._handles = [
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

        # Schedulers that are made later wrap a function.
        @functools.wraps(cls.step)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self.step(optimizer, *args, **kwargs)

        self._function = step
        has_scheduler = "step" in vars(optimizer)
        optimizer.step = _wrapped_for_schedulers(optimizer, step) if has_scheduler else _WeakMethod(optimizer, step)
        # Copies and pickles call it.
        optimizer.__getstate__ = _WeakMethod(optimizer, self._state_as_torch_has_it)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Takes a step on the kernels, or by the ``step`` of the optimizer's class.

        The class takes the step after `revert`, under torch.compile, and if torch's functions are patched.
        """
        if not self._is_active or not self._step_functions.are_in_place() or torch.compiler.is_compiling():
            self._kernels.release(optimizer.state)
            return type(optimizer).step(optimizer, *args, **kwargs)
        if is_observed(optimizer):
            return Optimizer.profile_hook_step(self._kernels.step_for)(optimizer, *args, **kwargs)
        return self._kernels.step_for(optimizer, *args, **kwargs)

    def revert(self, reference: weakref.ref[Optimizer]) -> None:
        """Ends the conversion of the optimizer behind ``reference``, if that still exists.

        A ``step`` that another program has wrapped stays, and calls torch's step.
        """
        optimizer = reference()
        if optimizer is None or not self._is_active:
            return
        self._is_active = False
        del _conversions[optimizer]
        for handle in self._handles:
            handle.remove()
        self._kernels.release(optimizer.state)
        vars(optimizer).pop("__getstate__", None)
        if _has_step_of(optimizer, self._function):
            own = vars(optimizer).pop("step")
            if _is_wrapped_for_schedulers(own):
                optimizer.step = _wrapped_for_schedulers(optimizer, type(optimizer).step)

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


class _WeakMethod:
    """A method that holds its optimizer by a weak reference; after the optimizer's end the function receives None."""

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


def _step_functions(cls: type[Optimizer]) -> Originals:
    methods = (f"own.{cls.__name__}.{name}" for name in _METHODS)
    return Originals((torch,), _MODULES, *methods, _FUNCTIONS[cls])


def _has_step_of(optimizer: Optimizer, function: Callable[..., Any]) -> bool:
    """Returns True if the optimizer's ``step`` is ``function``, bare or wrapped by learning-rate schedulers."""
    step = vars(optimizer).get("step")
    if isinstance(step, _WeakMethod):
        return step.__func__ is function
    if step is None:
        return function is type(optimizer).step
    return _is_wrapped_for_schedulers(step) and step.__wrapped__ is function


def _is_wrapped_for_schedulers(step: Any) -> bool:
    return hasattr(step, "_wrapped_by_lr_sched") and hasattr(step, "__wrapped__")


def _wrapped_for_schedulers(optimizer: Optimizer, step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``step`` wrapped as by learning-rate schedulers, which warn if they are stepped before the optimizer.

    The schedulers' own wrapper calls the function that the class had when the schedulers were made.
    """
    reference = weakref.ref(optimizer)

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        assert owner is not None
        vars(owner)["_opt_called"] = True
        return step.__get__(owner, type(owner))(*args, **kwargs)

    vars(wrapper)["_wrapped_by_lr_sched"] = True
    return wrapper
