"""Patches of functions of torch that hand tensors to C++ past its modes: they get values in place of deferred tensors.

They are :meth:`torch.autograd.Function.apply`, and the method by which torch's checkpointing keeps its inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.utils.checkpoint
from torch.autograd import Function
from torch.overrides import _get_current_function_mode

from lightkit.capture.deferred import compute_all
from lightkit.capture.mode import CaptureMode

_lock = threading.Lock()
_users = 0
# A classmethod of Python before torch 2.14, one of C++ since: both bind by `__get__`.
_torchs_apply = vars(Function)["apply"]
_Frame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", object)
# Since torch 2.13; before, the inputs went through an autograd.Function.
_torchs_save_inputs = vars(_Frame).get("save_inputs")


def patch_unseen_functions() -> Callable[[], None]:
    """Makes the functions receive values in place of deferred tensors, in all threads.

    Returns:
        A function that ends this use of the patches; the last one restores torch's methods.
    """
    global _users
    with _lock:
        _users += 1
        if vars(Function)["apply"] is _torchs_apply:
            Function.apply = classmethod(_apply)  # pyright: ignore[reportAttributeAccessIssue]
        if _torchs_save_inputs is not None and vars(_Frame)["save_inputs"] is _torchs_save_inputs:
            _Frame.save_inputs = _save_inputs

    def undo() -> None:
        global _users
        with _lock:
            _users -= 1
            if _users == 0:
                Function.apply = _torchs_apply  # pyright: ignore[reportAttributeAccessIssue]
                if _torchs_save_inputs is not None:
                    _Frame.save_inputs = _torchs_save_inputs

    return undo


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    mode = _get_current_function_mode()
    # What the function's forward returns goes back to C++, too.
    with mode.paused() if isinstance(mode, CaptureMode) else nullcontext():
        return _torchs_apply.__get__(None, cls)(*compute_all(args), **compute_all(kwargs))


def _save_inputs(frame: Any, *args: Any) -> None:
    assert _torchs_save_inputs is not None
    _torchs_save_inputs(frame, *compute_all(args))
