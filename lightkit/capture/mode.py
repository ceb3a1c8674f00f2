"""The mode that records operations during a call of a module."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightkit.capture.deferred import METADATA, Deferred, read_metadata
from lightkit.capture.node import Node
from lightkit.capture.recorder import Context, Recorder, current_settings
from lightkit.capture.recorders import RECORDERS
from lightkit.capture.replacements import REPLACEMENTS
from lightkit.capture.saved_tensors import are_saved_tensors_packed
from lightkit.capture.window import Window

if TYPE_CHECKING:
    from lightkit.capture.capture import Capture

_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool})

# torch.nn.functional's functions that write to a parameter or buffer without a name that says so.
_WRITES = frozenset({torch.nn.functional.embedding, torch.nn.functional.instance_norm, torch.embedding_renorm_})

_C_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


class CaptureMode(TorchFunctionMode):
    """Receives each call of a torch function in its thread; the operations of `RECORDERS` wait, the others run.

    An operation runs after the waiting ones if it takes one of their values, or if it may write to a tensor, which may
    be one that they read. So no operation sees another order than the program's.

    Args:
        capture: finds the way in which the operations run.
    """

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture
        self._window = Window(capture, Context(*current_settings()))
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Runs the waiting operations, and lets torch run all others at once in the context."""
        before, self._is_paused = self._is_paused, True
        try:
            self.compute()
            yield
        finally:
            self._is_paused = before

    def compute(self) -> None:
        """Runs the operations that wait."""
        self._window.compute()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Records the call if it can wait; otherwise runs it."""
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if are_saved_tensors_packed():
            # Torch's checkpointing calls the function again in backward, and compares what both calls save.
            self._window.compute()
            return func(*args, **kwargs)
        recorder = RECORDERS.get(func)
        if recorder is not None:
            result = self._record(recorder, func, args, kwargs)
            if result is not None:
                return result
        elif func in METADATA:
            return read_metadata(func, args, kwargs) if type(args[0]) is Deferred else func(*args, **kwargs)
        elif Deferred not in types and not _may_write(func, kwargs):
            if self._window.reads_written((*args, *kwargs.values())):
                self._window.compute()
            return self._run(func, args, kwargs)
        if func is Tensor.add_ and type(args[0]) is Tensor and args[0].dtype in _INTEGERS:
            # The counter of batches of a batch norm: no operation reads integers.
            return func(*args, **kwargs)
        self._window.compute()
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a function at once, by lightkit if it has one of its own."""
        replacement = REPLACEMENTS.get(func)
        if replacement is not None:
            result = replacement.compute(*args, **kwargs)
            if result is not None:
                self._capture.note(func.__name__, replacement.name)
                return result
        return func(*args, **kwargs)

    def _record(self, recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Returns a tensor that stands for the result of a call; None if the call cannot wait."""
        window = self._window
        if current_settings() != window.context:
            window.compute()
            self._window = window = Window(self._capture, Context(*current_settings()))
        in_place = recorder.writes(args, kwargs)
        node = window.repeat(func, args, kwargs)
        if node is not None:
            return window.add_in_place(node, args[0]) if in_place else window.add(node)
        if in_place and type(args[0]) is not Deferred:
            return None
        try:
            result = recorder.record(window.context, *args, **kwargs)
        except TypeError:
            # Torch raises its own error for arguments that do not fit.
            return None
        if not isinstance(result, Node):
            return result
        for operand in result.operands:
            if type(operand) is Node and operand.window is not window:
                return None
        window.remember(func, args, kwargs, result)
        return window.add_in_place(result, args[0]) if in_place else window.add(result)


def _may_write(func: Any, kwargs: Any) -> bool:
    """Returns True unless a function is torch's and its name says that it writes to no tensor."""
    if kwargs.get("out") is not None or kwargs.get("inplace"):
        return True
    known = _MAY_WRITE.get(func)
    if known is None:
        known = _MAY_WRITE[func] = _name_says_write(func)
    return known


_MAY_WRITE: dict[Any, bool] = {}


def _name_says_write(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if func in _WRITES or not name:
        return True
    module = getattr(func, "__module__", None) or ""
    if not isinstance(func, _C_FUNCTIONS) and not module.startswith("torch."):
        return True
    if name.startswith("__"):
        # Of the operators, __iadd__ and its kind write, and so does an assignment to an element or an attribute.
        return (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")) or name.startswith(
            ("__set", "__del")
        )
    return name.endswith("_")
