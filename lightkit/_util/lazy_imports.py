"""Defers imports of other libraries that take seconds and that a job seldom needs.

Lightning imports the compiler of torch for one class, torchmetrics imports SciPy for one function and matplotlib for
the types of two arguments. In a process of one of lightkit's commands a stand-in takes the place of each of these
modules. It knows what those imports ask for. Anything else that is asked of it imports the module itself, which then
takes its place again. ``LIGHTKIT_LAZY=0`` leaves all imports as they are.

Programs that import lightkit are not concerned: `defer` is called by the commands alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from lightkit.errors import ConfigError

_lock = threading.RLock()
_NO_MODULE = ModuleType("none")

_OF_THE_IMPORT_SYSTEM = ("__spec__", "__loader__", "__package__", "__file__", "__path__", "__cached__")

# Attributes that the import system and tools read of every module, if it has them.
_ASKED_OF_ALL = ("__path__", "__warningregistry__", "__wrapped__")


def defer() -> None:
    """Puts the stand-ins in place for this process, unless ``LIGHTKIT_LAZY=0``.

    A module that has been imported already stays as it is, and so does one that is not installed.

    Raises:
        ConfigError: ``LIGHTKIT_LAZY`` is neither 0 nor 1.
    """
    value = os.environ.get("LIGHTKIT_LAZY", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"LIGHTKIT_LAZY must be 0 or 1, got {value!r}")
    if value == "1" and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _StandIn(ModuleType):
    """Answers for a module until something is asked that only the module itself can answer."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        # The import system asks while it makes the module.
        if self.__name__ not in sys.modules or (name in _ASKED_OF_ALL and sys.modules[self.__name__] is self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_import(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if sys.modules.get(self.__name__) is self or name in _OF_THE_IMPORT_SYSTEM:
            super().__setattr__(name, value)
        else:
            setattr(_import(self), name, value)

    def __dir__(self) -> list[str]:
        return dir(_import(self))


def _import(stand_in: _StandIn) -> ModuleType:
    """Imports the module that a stand-in answers for, unless that has happened, and puts it in its place.

    The other stand-ins for modules of the same library go with it: its modules know each other.
    """
    name = stand_in.__name__
    library = name.partition(".")[0] + "."
    with _lock:
        if sys.modules.get(name) is stand_in:
            others = {n: m for n, m in sys.modules.items() if n.startswith(library) and isinstance(m, _StandIn)}
            for other in others:
                del sys.modules[other]
            try:
                for other in others:
                    module = importlib.import_module(other)
                    _give(others[other], module)
            except BaseException:
                sys.modules.update(others)
                raise
    return sys.modules[name]


def _give(stand_in: _StandIn, module: ModuleType) -> None:
    """Sets on a module what others have set on its stand-in, and what others would have added to it."""
    known = _STAND_INS[stand_in.__name__]()
    for name, value in vars(stand_in).items():
        is_own = name in _OF_THE_IMPORT_SYSTEM or name in vars(_NO_MODULE) or isinstance(value, ModuleType)
        if not is_own and (name not in known or not hasattr(module, name)):
            setattr(module, name, value)


class _Finder:
    """Finds stand-ins in place of modules, each of them once."""

    def __init__(self) -> None:
        self._names = set(_STAND_INS)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of a stand-in, or None for every other module."""
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, _StandIn) and name not in self._names:
            # A module inside of one that is deferred: the package comes first, and may bring it.
            _import(parent)
            if name in sys.modules:
                return importlib.machinery.ModuleSpec(name, _Existing())
        if name not in self._names:
            return None
        self._names.remove(name)
        # Asked of the others; it is not found where it is not installed.
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        result = importlib.machinery.ModuleSpec(
            name, _Loader(), origin=spec.origin, is_package=spec.submodule_search_locations is not None
        )
        result.has_location = True
        result.submodule_search_locations = spec.submodule_search_locations
        return result


class _Loader:
    """Makes a stand-in."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, _STAND_INS[spec.name]())

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Existing:
    """Hands out a module that has come while it was looked for."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = sys.modules[spec.name]
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _is_imported(name: str) -> bool:
    """Returns whether a module, and no stand-in for it, has been imported."""
    return name in sys.modules and not isinstance(sys.modules[name], _StandIn)


def _later(name: str, attribute: str) -> Callable[..., Any]:
    """Returns a function that imports the one of that name when it is called."""

    def call(*arguments: Any, **options: Any) -> Any:
        module = sys.modules.get(name)
        module = _import(module) if isinstance(module, _StandIn) else importlib.import_module(name)
        return getattr(module, attribute)(*arguments, **options)

    call.__name__ = call.__qualname__ = attribute
    call.__module__ = name
    return call


class _ClassOf(type):
    """A class that is asked about in `isinstance` only: until its module is imported, nothing is an instance of it."""

    def __new__(cls, name: str, module: str) -> type:
        return super().__new__(cls, name, (), {"__module__": module})

    def __init__(cls, name: str, module: str) -> None:
        super().__init__(name, (), {})

    def _real(cls) -> type:
        return getattr(importlib.import_module(cls.__module__), cls.__name__)

    def __instancecheck__(cls, instance: Any) -> bool:
        return _is_imported(cls.__module__) and isinstance(instance, cls._real())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return _is_imported(cls.__module__) and issubclass(subclass, cls._real())


def _disable(function: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> Callable[..., Any]:
    """Does what `torch._dynamo.disable` does, from the moment that there is a compiler which could be disabled."""
    if function is None or arguments[:1] == (False,) or options.get("recursive") is False:
        return _later("torch._dynamo", "disable")(function, *arguments, **options)
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if not _is_imported("torch._dynamo"):
                return function(*args, **kwargs)
            disabled = sys.modules["torch._dynamo"].disable(function, *arguments, **options)
        return disabled(*args, **kwargs)

    # The compiler looks for these before it follows a call.
    call._torchdynamo_disable = True
    call._torchdynamo_disable_msg = options.get("reason")
    return call


def _dynamo() -> dict[str, Any]:
    """Lightning asks for the class, torch's optimizers for the functions, torch's process groups for the cache."""
    return {
        "OptimizedModule": _ClassOf("OptimizedModule", "torch._dynamo"),
        "disable": _disable,
        # Says something to the compiler while it compiles, and nothing to anybody else.
        "graph_break": lambda msg="": None,
        "trace_rules": SimpleNamespace(clear_lru_cache=lambda: None),
    }


def _nothing() -> dict[str, Any]:
    """`torch.use_deterministic_algorithms` sets an option of the compiler, and asks nothing."""
    return {}


def _scipy_signal() -> dict[str, Any]:
    """Torchmetrics gives SciPy a name back that it once had, unless it is there."""
    return {"hamming": _later("scipy.signal.windows", "hamming")}


def _plot() -> dict[str, Any]:
    """Every metric of torchmetrics has types of this module in its signatures, and calls it to draw."""
    functions = ("plot_confusion_matrix", "plot_curve", "plot_single_or_multi_val")
    types = {"_AX_TYPE": object, "_PLOT_OUT_TYPE": tuple[object, object], "_CMAP_TYPE": object}
    return types | {name: _later("torchmetrics.utilities.plot", name) for name in functions}


# What each stand-in knows.
_STAND_INS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch._dynamo": _dynamo,
    "torch._inductor": _nothing,
    "torch._inductor.config": _nothing,
    "scipy.signal": _scipy_signal,
    "torchmetrics.utilities.plot": _plot,
}
