"""A call of a module during which its operations are captured."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from lightkit._util.originals import Originals
from lightkit.capture.capture import Capture
from lightkit.capture.mode import CaptureMode
from lightkit.capture.saved_tensors import are_saved_tensors_packed
from lightkit.ops._code_patch import is_dispatched_by_modes

# Torch's functions in Python that pass on their own name: a patch in the place of one would be called twice.
_ORIGINALS = Originals(
    (torch,),
    torch.nn.functional,
    *("relu", "max_pool2d", "batch_norm", "dropout", "log_softmax", "softmax", "adaptive_avg_pool2d"),
    *("multi_head_attention_forward", "gelu", "silu", "leaky_relu", "tanh", "sigmoid", "hardtanh", "relu6", "elu"),
    *("hardswish", "hardsigmoid", "softplus"),
)


class _Thread(threading.local):
    mode: CaptureMode | None = None


_thread = _Thread()


def call_captured(capture: Capture, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Returns ``function(*args, **kwargs)``, with the operations captured, in a thread that `can_capture`."""
    _thread.mode = mode = CaptureMode(capture)
    try:
        with mode:
            result = function(*args, **kwargs)
        mode.compute()
    finally:
        _thread.mode = None
    return result


def can_capture() -> bool:
    """Returns False within a captured call, and where something else watches or changes what functions do."""
    return _thread.mode is None and not are_saved_tensors_packed() and not _is_watched()


class _ModuleCall(ABC):
    """Replaces the call of a module until `undo`.

    The constructor sets the object as the compiled call, ``module._compiled_call_impl``, which torch calls in place of
    ``_call_impl`` if it is set. The class and ``forward`` of the module stay the user's. Copies and pickles of the
    module have torch's call, and torch.compile, torch.export and torch.jit do not read the attribute.

    Args:
        module: a module that is not compiled.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        module._compiled_call_impl = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the module for these arguments."""
        module = self._module()
        assert module is not None
        return self.call(module, args, kwargs)

    @abstractmethod
    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Returns the output of ``module`` for these arguments."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A LightningModule copies and pickles all of its attributes; None is a module that is not compiled.
        return type(None), ()

    def undo(self) -> None:
        """Restores torch's call, unless ``module.compile()`` has replaced this object since its construction."""
        module = self._module()
        if module is not None and vars(module).get("_compiled_call_impl") is self:
            del module._compiled_call_impl


class CapturedCall(_ModuleCall):
    """Replaces the call of a module: ``module(...)`` runs the same code, with its operations captured.

    A call within a captured call belongs to it. Under hooks of saved tensors, torch.compile, torch.func, tracing, a
    TorchDispatchMode or another TorchFunctionMode, which watch or change what functions do, the call is torch's.

    Args:
        module: a module that is not compiled.
        capture: finds the way in which the operations run.
    """

    def __init__(self, module: nn.Module, capture: Capture) -> None:
        super().__init__(module)
        self._capture = capture
        self._is_proven = False
        # The reason why calls are torch's.
        self.reason: str | None = None

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Returns the output of ``module`` for these arguments."""
        if self.reason is not None or not can_capture():
            return module._call_impl(*args, **kwargs)
        if self._is_proven:
            return call_captured(self._capture, module._call_impl, args, kwargs)
        return self._first_call(module, args, kwargs)

    def _first_call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Calls the module, and leaves it to torch from then on if its code cannot be captured."""
        generator, buffers = torch.get_rng_state(), [(buffer, buffer.clone()) for buffer in module.buffers()]
        try:
            result = call_captured(self._capture, module._call_impl, args, kwargs)
        except Exception as error:
            torch.set_rng_state(generator)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            # An error of the user's code is raised again.
            result = module._call_impl(*args, **kwargs)
            self.reason = f"its code cannot be captured: {type(error).__name__}: {error}"
        self._is_proven = True
        return result


class SkippedCall(_ModuleCall):
    """Replaces the call of a module within captured ones: torch runs its operations at once."""

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Returns the output of ``module`` for these arguments."""
        with nullcontext() if _thread.mode is None else _thread.mode.paused():
            return module._call_impl(*args, **kwargs)


def is_captured(module: nn.Module) -> bool:
    """Returns True if a `CapturedCall` replaces the call of a module."""
    return isinstance(vars(module).get("_compiled_call_impl"), CapturedCall)


def _is_watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not _ORIGINALS.are_in_place()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or is_dispatched_by_modes()
        or not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
    )
