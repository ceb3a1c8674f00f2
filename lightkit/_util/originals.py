"""Tells whether functions of another library are still that library's own."""

from __future__ import annotations

import types
from operator import attrgetter
from pathlib import Path
from typing import Any

# What is written in C has no code that could be anybody else's.
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


class Originals:
    """Functions of a library whose work is done in another way while nobody has replaced them.

    Whoever patches one of them, before this object is made or later, on a class or on its base, wants it called.

    Args:
        library: the package, such as ``torch``.
        root: the object that the names start from.
        names: at least two, dotted, such as ``"nn.Conv2d.forward"``.
    """

    def __init__(self, library: types.ModuleType, root: Any, *names: str) -> None:
        self._root = root
        self._find = attrgetter(*names)
        found = self._find(root)
        self._own = found if all(is_own(function, library) for function in found) else None

    def are_in_place(self) -> bool:
        """Returns True if every function is the library's; takes about a microsecond for twenty."""
        return self._find(self._root) == self._own


def is_own(function: Any, library: types.ModuleType) -> bool:
    """Returns True if a function, and what it wraps, is written in the files of a library.

    Names do not tell: `functools.wraps` gives a wrapper those of what it wraps.
    """
    root = str(Path(library.__file__).parent)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:
            return isinstance(function, _BUILTINS)
        if not code.co_filename.startswith(root):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
