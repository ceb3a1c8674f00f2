"""Checks whether functions of another library are still that library's own, or have been patched."""

from __future__ import annotations

import types
from operator import attrgetter
from pathlib import Path
from typing import Any

from lightkit._util import lazy_imports

# Functions written in C have no code object, so nobody can have replaced their code.
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


class Originals:
    """A set of functions of a library, with a check that nobody has patched one of them.

    lightkit replaces the work of such functions by faster code. If a program has patched one of them, on a class or on
    its base, before or after this object was made, lightkit must call the patch instead.

    Args:
        libraries: the packages that contain the functions and their decorators, such as ``torch``.
        root: the object at which the dotted names start, such as the module ``torch``.
        names: the dotted names of at least two functions, such as ``"nn.Conv2d.forward"``.
    """

    def __init__(self, libraries: tuple[types.ModuleType, ...], root: Any, *names: str) -> None:
        self._root = root
        self._names = names
        self._find = attrgetter(*names)
        self._own = tuple(function if is_own(function, libraries) else None for function in self._find(root))

    def are_in_place(self) -> bool:
        """Returns True if every function is the library's own; takes about a microsecond for twenty functions."""
        return self._find(self._root) == self._own

    def first_replaced(self) -> str | None:
        """Returns the dotted name of the first function that is not the library's own; None if all are."""
        pairs = zip(self._names, self._find(self._root), self._own, strict=True)
        return next((name for name, function, own in pairs if function is not own), None)


def is_own(function: Any, libraries: tuple[types.ModuleType, ...]) -> bool:
    """Returns True if ``function``, and each function that it wraps, is defined in the files of ``libraries``.

    A function written in C counts as the library's own. The check uses the source file and not ``__module__``, since
    `functools.wraps` copies ``__module__`` from the wrapped function to a wrapper of any origin.
    """
    # The stand-in for torch's compiler in `lazy_imports` wraps functions as the compiler would.
    roots = (*(str(Path(str(library.__file__)).parent) for library in libraries), lazy_imports.__file__)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:
            return isinstance(function, _BUILTINS)
        if not code.co_filename.startswith(roots):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
