"""A patch of :meth:`torch.autograd.Function.apply`, which no mode of torch sees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch.autograd import Function
from torch.overrides import _get_current_function_mode

from lightkit.capture.deferred import compute_all
from lightkit.capture.mode import CaptureMode

_lock = threading.Lock()
_users = 0
# A classmethod of Python before torch 2.14, one of C++ since: both bind by `__get__`.
_torchs = vars(Function)["apply"]


def patch_function_apply() -> Callable[[], None]:
    """Makes the functions of programs receive values in place of deferred tensors, in all threads.

    Returns:
        A function that ends this use of the patch; the last one restores torch's method.
    """
    global _users
    with _lock:
        _users += 1
        if vars(Function)["apply"] is _torchs:
            Function.apply = classmethod(_apply)  # pyright: ignore[reportAttributeAccessIssue]

    def undo() -> None:
        global _users
        with _lock:
            _users -= 1
            if _users == 0:
                Function.apply = _torchs  # pyright: ignore[reportAttributeAccessIssue]

    return undo


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    mode = _get_current_function_mode()
    # What the function's forward returns goes back to C++, too.
    with mode.paused() if isinstance(mode, CaptureMode) else nullcontext():
        return _torchs.__get__(None, cls)(*compute_all(args), **compute_all(kwargs))
