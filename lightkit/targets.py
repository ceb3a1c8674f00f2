"""The classes that a user's configuration may build, and the checks of their arguments.

The configuration in a checkpoint may build far fewer classes: see `lightkit.app.untrusted`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from lightkit.errors import ConfigError

# A configuration may build the classes that these packages export, by any public path. The constructors of private
# classes may open files, sockets and processes.
_PUBLIC_PACKAGES = (
    "lightkit.callbacks",
    "lightkit.compress",
    "lightkit.data",
    "lightkit.data.augment",
    "lightkit.finetune",
    "lightkit.loggers",
    "lightkit.models",
    "lightkit.nn",
    "lightkit.optim",
    "lightkit.strategies",
    "lightkit.tasks",
    "lightning.pytorch",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.nn",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.optim.swa_utils",
    "torchmetrics",
    "torchmetrics.aggregation",
    "torchmetrics.classification",
    "torchmetrics.clustering",
    "torchmetrics.detection",
    "torchmetrics.nominal",
    "torchmetrics.regression",
    "torchmetrics.retrieval",
    "torchmetrics.segmentation",
    "torchmetrics.wrappers",
)

# Some metrics of these packages, which `torchmetrics` exports too, download a model in their constructor.
_DOWNLOADING_PACKAGES = ("torchmetrics.audio", "torchmetrics.image", "torchmetrics.multimodal", "torchmetrics.text")

_user_packages: list[str] = []


def allow_targets(*packages: str) -> None:
    """Allows configurations to build the public classes of further packages, such as a user's own.

    The environment variable ``LIGHTKIT_TARGETS``, package names separated by commas, does the same for the command
    line.

    Args:
        *packages: dotted names of packages.
    """
    _user_packages.extend(packages)


def user_packages() -> list[str]:
    """Returns the packages that `allow_targets` and ``LIGHTKIT_TARGETS`` name."""
    return _user_packages + [name.strip() for name in os.environ.get("LIGHTKIT_TARGETS", "").split(",") if name.strip()]


def is_in_user_package(target: str) -> bool:
    """Returns True if ``target`` lies in one of `user_packages`."""
    return any(target.startswith(f"{package}.") for package in user_packages())


def find_class(target: str) -> type:
    """Returns the class that a ``_target_`` names.

    Args:
        target: ``PACKAGE.CLASS``: a class that a public package exports, or any public class of one of the user's
            packages, see `allow_targets`.

    Raises:
        ConfigError: the class does not exist, or a configuration may not build it.
    """
    own = user_packages()
    if package := _package_of(target, own):
        return _find_user_class(target, package)
    package = _package_of(target, _PUBLIC_PACKAGES)
    if package is None:
        public = ", ".join(p for p in _PUBLIC_PACKAGES if not _package_of(p, _PUBLIC_PACKAGES))
        raise ConfigError(
            f"_target_: {target!r} is not in a package that a configuration may use ({', '.join([public, *own])})"
            f"{_suggest_target(target)}; add your own with LIGHTKIT_TARGETS=PACKAGE or lightkit.config.allow_targets"
        )
    if _is_private(target):
        raise ConfigError(f"_target_: {target!r} is private, and a configuration may use public classes alone")
    module_name, _, name = target.rpartition(".")
    exported = exported_classes(package)
    if name not in exported:
        raise ConfigError(f"_target_: {package} has no class {name!r}{nearest(name, exported, prefix=package + '.')}")
    # Users also write the path of the module that defines a class, such as torch.optim.adam.Adam.
    if module_name != package and _import(module_name, target).__dict__.get(name) is not exported[name]:
        raise ConfigError(f"_target_: {module_name} has no class {name!r}; did you mean {package}.{name}?")
    return exported[name]


def exported_classes(package: str) -> dict[str, type]:
    """Returns the classes that a public package exports and that a configuration may build, by name."""
    module = _import(package, package)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name in vars(module) if not name.startswith("_")]
    top = package.partition(".")[0]
    exported = {name: getattr(module, name, None) for name in names}
    return {name: cls for name, cls in exported.items() if inspect.isclass(cls) and _is_buildable(cls, top)}


def _is_buildable(cls: type, top: str) -> bool:
    if not _is_within(cls.__module__, [top]):
        # lightkit.nn exports some of torch's losses unchanged.
        return top == "lightkit" and _is_within(cls.__module__, ["torch.nn"])
    return not _is_within(cls.__module__, _DOWNLOADING_PACKAGES)


def _find_user_class(target: str, package: str) -> type:
    module_name, _, name = target.rpartition(".")
    if _is_private(target[len(package) :]):
        raise ConfigError(f"_target_: {target!r} is private, and a configuration may use public classes alone")
    cls = getattr(_import(module_name, target), name, None)
    if cls is None:
        classes = [key for key, value in vars(_import(module_name, target)).items() if inspect.isclass(value)]
        raise ConfigError(f"_target_: {module_name} has no {name}{nearest(name, classes, prefix=module_name + '.')}")
    # The package must define the class; a class that it imports from elsewhere does not count.
    if not inspect.isclass(cls) or not _is_within(cls.__module__, [package]):
        raise ConfigError(f"_target_: {target!r} is not a class of the package {package}")
    return cls


def _import(module_name: str, target: str) -> types.ModuleType:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise ConfigError(f"_target_: {target} needs the package {error.name}, which is not installed") from error
        raise ConfigError(f"_target_: there is no module {module_name}{_suggest_target(target)}") from error


def _package_of(target: str, packages: Iterable[str]) -> str | None:
    """Returns the innermost of the ``packages`` that contain ``target``; None if none contains it."""
    return max((p for p in packages if target.startswith(f"{p}.")), key=len, default=None)


def _is_private(path: str) -> bool:
    return any(part.startswith("_") for part in path.split("."))


def _is_within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _suggest_target(target: str) -> str:
    """Returns a suggestion for a message about ``target``, which names no class, since a part of it is misspelt.

    Returns:
        A clause with the public classes of lightkit, torch.nn and torch.optim whose paths, or whose names, are nearest
        to ``target``; an empty string if no class is near.
    """
    name = target.rpartition(".")[2]
    packages = [p for p in _PUBLIC_PACKAGES if p.startswith("lightkit.")] + ["torch.optim", "torch.nn"]
    known = [f"{package}.{cls}" for package in packages for cls in exported_classes(package)]
    return nearest(target, known) or nearest(name, known)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns ``"; did you mean a, b?"`` with up to three known names close to ``name``; an empty string without one.

    Args:
        name: the unknown name.
        known: the known names.
        prefix: a string before each name in the result.
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(prefix + c for c in close)}?" if close else ""


def type_hints(cls: type) -> dict[str, Any]:
    """Returns the type hints of a constructor by name; an empty dict if one of them cannot be resolved."""
    try:
        return typing.get_type_hints(cls.__init__)
    except (NameError, TypeError, AttributeError):
        # Some modules import the types of their hints for type checkers only.
        return {}


def _union_members(hint: Any) -> set[Any]:
    """Returns the member types of ``hint`` if it is a union, else a set with ``hint`` alone."""
    return set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}


_PLAIN_TYPES = (int, float, bool, str, type(None))


def is_plain_type(hint: Any) -> bool:
    """Returns True if ``hint`` is int, float, bool, str or None, or a union of these."""
    return _union_members(hint) <= set(_PLAIN_TYPES)


def _is_accepted(value: Any, hint: Any) -> bool:
    """Returns False if ``hint`` has plain types alone and ``value`` is a plain value or container of another type.

    The plain types are int, float, bool, str and None; an int is accepted as a float. The function recognizes
    OmegaConf's containers by their module, since they are neither dicts nor lists.
    """
    options = _union_members(hint)
    is_container = isinstance(value, (list, dict)) or type(value).__module__.startswith("omegaconf.")
    if not is_plain_type(hint) or not (isinstance(value, _PLAIN_TYPES) or is_container):
        return True
    return type(value) in options or (type(value) is int and float in options)


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], owner: str = "") -> None:
    """Rejects values whose type differs from the hint of the same name.

    Args:
        values: the values of a configuration by name.
        hints: the types by name; a value without a hint may have any type.
        owner: a string before the value's name in the message.

    Raises:
        ConfigError: a value has a wrong type; the message has its name and the accepted types.
    """
    for name, value in values.items():
        if not _is_accepted(value, hints.get(name)):
            expected = " or ".join(sorted(t.__name__.replace("NoneType", "null") for t in _union_members(hints[name])))
            got = "null" if value is None else repr(value)
            raise ConfigError(f"{owner}{name} must be {expected}, got {got}")


def check_arguments(cls: type, target: str, arguments: Mapping[str, Any], as_partial: bool = False) -> None:
    """Rejects arguments that a class does not take, arguments of a wrong type, and missing arguments.

    Args:
        cls: the class.
        target: the name of the class in the configuration, for the message.
        arguments: the arguments by name.
        as_partial: True accepts missing arguments, which the caller adds later.

    Raises:
        ConfigError: an argument is wrong or missing; the message has its name and the nearest known names.
    """
    try:
        parameters = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # A constructor with **kwargs passes them to its base class, whose parameters count too.
        named = {
            n for base in cls.__mro__ if "__init__" in vars(base) for n in inspect.signature(base.__init__).parameters
        }
        if not cls.__module__.startswith("lightkit."):
            return
    else:
        named = set(parameters)
    for name in arguments:
        if name not in named:
            raise ConfigError(f"{target} takes no argument {name!r}{nearest(name, named)}")
    check_types(arguments, type_hints(cls), owner=f"{target}: ")
    if as_partial:
        return
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in arguments
    ]
    if missing:
        raise ConfigError(f"{target} needs the argument {', '.join(map(repr, missing))}")
