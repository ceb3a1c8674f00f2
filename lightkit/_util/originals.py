"""Tells whether functions of another library are still that library's own."""

from __future__ import annotations

import types
from operator import attrgetter
from pathlib import Path
from typing import Any

from lightkit._util import lazy_imports

# Functions written in C have no code object, so nobody can have replaced their code.
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


class Originals:
    """Functions of a library whose work is done in another way while nobody has replaced them.

    Whoever patches a function, before this object is made or later, on a class or on its base, wants the patch called.

    Args:
        libraries: the packages that contain the functions and their decorators, such as ``torch``.
        root: the object that the names start from.
        names: at least two, dotted, such as ``"nn.Conv2d.forward"``.
    """

    def __init__(self, libraries: tuple[types.ModuleType, ...], root: Any, *names: str) -> None:
        self._root = root
        self._names = names
        self._find = attrgetter(*names)
        self._own = tuple(function if is_own(function, libraries) else None for function in self._find(root))

    def are_in_place(self) -> bool:
        """Returns True if every function is the library's; takes about a microsecond for twenty."""
        return self._find(self._root) == self._own

    def first_replaced(self) -> str | None:
        """Returns the name of a function that is not the library's, or None."""
        pairs = zip(self._names, self._find(self._root), self._own, strict=True)
        return next((name for name, function, own in pairs if function is not own), None)


def is_own(function: Any, libraries: tuple[types.ModuleType, ...]) -> bool:
    """Returns True if a function, and what it wraps, is written in the files of some libraries.

    Names do not tell: `functools.wraps` gives a wrapper those of what it wraps.
    """
    # The stand-in for torch's compiler wraps functions as the compiler itself would.
    roots = (*(str(Path(str(library.__file__)).parent) for library in libraries), lazy_imports.__file__)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:
            return isinstance(function, _BUILTINS)
        if not code.co_filename.startswith(roots):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
