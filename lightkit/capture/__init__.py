"""Runs the operations of any module on lightkit's kernels, without changes to its code.

A call of a module runs the user's Python code as it is. Operations that lightkit may have a kernel for are not
computed at once: a `lightkit.capture.deferred.Deferred` tensor stands for each result. When a value is needed, the
operations behind it are known, and the kernels compute consecutive ones together.
"""

from lightkit.capture.capture import Capture, Region
from lightkit.capture.module_call import is_captured
from lightkit.capture.selection import capture_calls, is_opaque, is_within, module_names

__all__ = ["Capture", "Region", "capture_calls", "is_captured", "is_opaque", "is_within", "module_names"]
