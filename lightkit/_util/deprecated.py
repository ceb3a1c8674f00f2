"""Aliases for names of the previous release; the use of an old name warns with the new name."""

from __future__ import annotations

import functools
import importlib
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for a module, which returns the new object under each old name with a warning.

    Args:
        module: ``__name__`` of the module.
        names: the old names in ``module``, each with the new dotted path ``PACKAGE.NAME`` of the object.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        package, _, new = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {names[name]}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(package), new)

    return find


class RenamedAttribute:
    """A descriptor under the old name of an attribute or a method: reading it warns and returns the new one.

    Args:
        path: the new name; a dotted path, such as ``traits.supports_lean_loop``, reads an attribute of an attribute.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        new = f"{owner.__name__}.{self._path}"
        warnings.warn(f"{owner.__name__}.{self._name} is now {new}", DeprecationWarning, stacklevel=2)
        return operator.attrgetter(self._path)(owner if instance is None else instance)


def renamed_parameters(**names: str) -> Callable[[F], F]:
    """Returns a decorator by which a function or a class also accepts old names of parameters, with a warning.

    Args:
        **names: the old names, each with the new name of the parameter: ``old="new"``.
    """

    def decorate(function: F) -> F:
        target: Any = function
        if isinstance(target, type):
            cls: Any = target
            cls.__init__ = decorate(cls.__init__)
            return function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    path = function.__qualname__.removesuffix(".__init__")
                    warnings.warn(f"{path}: {old} is now {new}", DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast("F", call)

    return decorate
