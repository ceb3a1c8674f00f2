"""Defers imports of other libraries that take seconds and that a job seldom needs.

Lightning imports the compiler of torch for one class, torchmetrics imports SciPy for one function and matplotlib for
the types of two arguments. In a process of one of lightkit's commands a stand-in takes the place of each of these
deferred modules, which `_STAND_INS` lists. A stand-in is a module object with the few names that those imports need.
The first access to any other name imports the deferred module, which then replaces the stand-in in ``sys.modules``.
``LIGHTKIT_LAZY=0`` leaves all imports as they are.

The commands alone call `defer`: programs that import lightkit keep their imports.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
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
    """Makes later imports of the deferred modules in this process return stand-ins, unless ``LIGHTKIT_LAZY=0``.

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
    """A module object in place of a deferred module, which it imports at the first access to a name it does not have.

    A write to an attribute imports nothing before that; the import copies the attribute to the deferred module.
    """

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        # The import system reads attributes while it makes the module.
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
    """Returns the module that ``stand_in`` replaces; imports it first if the stand-in is still in ``sys.modules``.

    The import also replaces the other stand-ins of the same top-level package, since its modules refer to each other.
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
    """Copies the attributes that other code has set on ``stand_in`` to ``module``."""
    known = _STAND_INS[stand_in.__name__]()
    for name, value in vars(stand_in).items():
        is_own = name in _OF_THE_IMPORT_SYSTEM or name in vars(_NO_MODULE) or isinstance(value, ModuleType)
        if not is_own and (name not in known or not hasattr(module, name)):
            setattr(module, name, value)


class _Finder(importlib.abc.MetaPathFinder):
    """An import finder that returns the stand-in of each deferred module once."""

    def __init__(self) -> None:
        self._names = set(_STAND_INS)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of a stand-in if ``name`` is a deferred module that nobody has imported or looked for yet.

        For a submodule of a stand-in the method first imports the stand-in's module; if that imports the submodule as
        well, the method returns a spec of the imported submodule.

        Returns:
            The spec; None if ``name`` is not one of `_STAND_INS` or is not installed, so that the next finder of
            ``sys.meta_path`` looks for it.
        """
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, _StandIn) and name not in self._names:
            # ``name`` is a submodule of a deferred package: importing the package may import the submodule.
            _import(parent)
            if name in sys.modules:
                return importlib.machinery.ModuleSpec(name, _Existing())
        if name not in self._names:
            return None
        self._names.remove(name)
        # The next finder says whether the module is installed.
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        result = importlib.machinery.ModuleSpec(
            name, _Loader(), origin=spec.origin, is_package=spec.submodule_search_locations is not None
        )
        result.has_location = True
        result.submodule_search_locations = spec.submodule_search_locations
        return result


class _Loader(importlib.abc.Loader):
    """A loader that creates the stand-in of a deferred module."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, _STAND_INS[spec.name]())

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Existing(importlib.abc.Loader):
    """A loader that returns the module that `_Finder.find_spec` has imported already, with its own spec."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = sys.modules[spec.name]
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _is_imported(name: str) -> bool:
    """Returns True if the module ``name`` has been imported; a stand-in does not count."""
    return name in sys.modules and not isinstance(sys.modules[name], _StandIn)


def _later(name: str, attribute: str) -> Callable[..., Any]:
    """Returns a function whose call imports the module ``name`` and calls the module's function ``attribute``."""

    def call(*arguments: Any, **options: Any) -> Any:
        module = sys.modules.get(name)
        module = _import(module) if isinstance(module, _StandIn) else importlib.import_module(name)
        return getattr(module, attribute)(*arguments, **options)

    call.__name__ = call.__qualname__ = attribute
    call.__module__ = name
    return call


class _ClassOf(type):
    """The type of a stand-in for a class that serves `isinstance` alone.

    Until the module of the class is imported, no object is an instance of it.
    """

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
    """Returns ``function`` in a wrapper that applies `torch._dynamo.disable` once the compiler has been imported.

    The parameters are those of `torch._dynamo.disable`. Calls before the import run ``function`` directly. Without a
    function, or for ``recursive=False``, the call imports the compiler and returns its result.
    """
    if function is None or arguments[:1] == (False,) or options.get("recursive") is False:
        return _later("torch._dynamo", "disable")(function, *arguments, **options)
    wrapped = function
    disabled: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if not _is_imported("torch._dynamo"):
                return wrapped(*args, **kwargs)
            disabled = sys.modules["torch._dynamo"].disable(wrapped, *arguments, **options)
            assert disabled is not None
        return disabled(*args, **kwargs)

    functools.update_wrapper(call, wrapped)
    # The compiler looks for these before it follows a call.
    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=options.get("reason"))
    return call


def _dynamo() -> dict[str, Any]:
    """Returns the names that Lightning, torch's optimizers and process groups import from ``torch._dynamo``."""
    return {
        "OptimizedModule": _ClassOf("OptimizedModule", "torch._dynamo"),
        "disable": _disable,
        # graph_break has an effect only while the compiler traces a function.
        "graph_break": lambda msg="": None,
        "trace_rules": SimpleNamespace(clear_lru_cache=lambda: None),
    }


def _nothing() -> dict[str, Any]:
    """Returns no names: `torch.use_deterministic_algorithms` only sets an attribute on the module."""
    return {}


def _scipy_signal() -> dict[str, Any]:
    """Returns ``hamming``: torchmetrics sets ``scipy.signal.hamming`` if the installed SciPy lacks it."""
    return {"hamming": _later("scipy.signal.windows", "hamming")}


def _plot() -> dict[str, Any]:
    """Returns the types in the signatures of torchmetrics' metrics, and the functions with which the metrics draw."""
    functions = ("plot_confusion_matrix", "plot_curve", "plot_single_or_multi_val")
    types = {"_AX_TYPE": object, "_PLOT_OUT_TYPE": tuple[object, object], "_CMAP_TYPE": object}
    return types | {name: _later("torchmetrics.utilities.plot", name) for name in functions}


# The names that each stand-in knows without its module.
_STAND_INS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch._dynamo": _dynamo,
    "torch._inductor": _nothing,
    "torch._inductor.config": _nothing,
    "scipy.signal": _scipy_signal,
    "torchmetrics.utilities.plot": _plot,
}
