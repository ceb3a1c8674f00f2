"""Classes that a configuration of the user's own may build, and the checks of their arguments.

What the configuration inside a checkpoint may build is another, much shorter list: see `lightkit.app.untrusted`.
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

# Public packages. A target is one of the classes that a package exports, by whatever public path it is named; what a
# package has for its own use stays out, since its constructors may open files, sockets and processes.
_PACKAGES = (
    "lightkit.callbacks",
    "lightkit.data",
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

# Metrics for texts, pictures and sound: some of them download a model when they are built. `torchmetrics` exports them.
_DOWNLOADING = ("torchmetrics.audio", "torchmetrics.image", "torchmetrics.multimodal", "torchmetrics.text")

_users: list[str] = []


def allow_targets(*packages: str) -> None:
    """Lets configurations build the public classes of further packages, such as a user's own.

    The environment variable ``LIGHTKIT_TARGETS`` does the same for the command line: names of packages,
    separated by commas.
    """
    _users.extend(packages)


def user_packages() -> list[str]:
    """Returns the packages that `allow_targets` and ``LIGHTKIT_TARGETS`` name."""
    return _users + [name.strip() for name in os.environ.get("LIGHTKIT_TARGETS", "").split(",") if name.strip()]


def find_class(target: str) -> type:
    """Returns the class that a ``_target_`` names.

    Args:
        target: ``PACKAGE.CLASS``: a class that a public package exports, or any public class of a package of the
            user's own, see `allow_targets`.

    Raises:
        ConfigError: there is no such class, or a configuration may not build it.
    """
    own = user_packages()
    if package := _package_of(target, own):
        return _find_in_users_package(target, package)
    package = _package_of(target, _PACKAGES)
    if package is None:
        public = ", ".join(p for p in _PACKAGES if not _package_of(p, _PACKAGES))
        raise ConfigError(
            f"_target_: {target!r} is not in a package that a configuration may use ({', '.join([public, *own])})"
            f"{_nearest_target(target)}; add your own with LIGHTKIT_TARGETS=PACKAGE or lightkit.config.allow_targets"
        )
    if _is_private(target):
        raise ConfigError(f"_target_: {target!r} is private, and a configuration may use public classes alone")
    module_name, _, name = target.rpartition(".")
    exported = exported_classes(package)
    if name not in exported:
        raise ConfigError(f"_target_: {package} has no class {name!r}{nearest(name, exported, prefix=package + '.')}")
    # The path may lead through the module that defines the class, as people write it: torch.optim.adam.Adam.
    if module_name != package and _import(module_name, target).__dict__.get(name) is not exported[name]:
        raise ConfigError(f"_target_: {module_name} has no class {name!r}; did you mean {package}.{name}?")
    return exported[name]


def exported_classes(package: str) -> dict[str, type]:
    """Returns the classes, by name, that a public package exports and that a configuration may build."""
    module = _import(package, package)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name in vars(module) if not name.startswith("_")]
    top = package.partition(".")[0]
    found = {name: getattr(module, name, None) for name in names}
    return {name: cls for name, cls in found.items() if inspect.isclass(cls) and _is_buildable(cls, top)}


def _is_buildable(cls: type, top: str) -> bool:
    if not _is_within(cls.__module__, [top]):
        # lightkit.nn exports losses of torch's as they are.
        return top == "lightkit" and _is_within(cls.__module__, ["torch.nn"])
    return not _is_within(cls.__module__, _DOWNLOADING)


def _find_in_users_package(target: str, package: str) -> type:
    module_name, _, name = target.rpartition(".")
    if _is_private(target[len(package) :]):
        raise ConfigError(f"_target_: {target!r} is private, and a configuration may use public classes alone")
    found = getattr(_import(module_name, target), name, None)
    if found is None:
        classes = [key for key, value in vars(_import(module_name, target)).items() if inspect.isclass(value)]
        raise ConfigError(f"_target_: {module_name} has no {name}{nearest(name, classes, prefix=module_name + '.')}")
    # Where it is defined counts, not where it was found: modules import all sorts of things.
    if not inspect.isclass(found) or not _is_within(found.__module__, [package]):
        raise ConfigError(f"_target_: {target!r} is not a class of the package {package}")
    return found


def _import(module_name: str, target: str) -> types.ModuleType:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise ConfigError(f"_target_: {target} needs the package {error.name}, which is not installed") from error
        raise ConfigError(f"_target_: there is no module {module_name}{_nearest_target(target)}") from error


def _package_of(target: str, packages: Iterable[str]) -> str | None:
    """Returns the longest of the packages that the target lies in, or None."""
    return max((p for p in packages if target.startswith(f"{p}.")), key=len, default=None)


def _is_private(path: str) -> bool:
    return any(part.startswith("_") for part in path.split("."))


def _is_within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _nearest_target(target: str) -> str:
    """Suggests the nearest class of lightkit or torch, where a package was misspelt."""
    name = target.rpartition(".")[2]
    packages = [p for p in _PACKAGES if p.startswith("lightkit.")] + ["torch.optim", "torch.nn"]
    known = [f"{package}.{cls}" for package in packages for cls in exported_classes(package)]
    return nearest(target, known) or nearest(name, known)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns `"; did you mean a, b?"` with the known names that are close to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(prefix + c for c in close)}?" if close else ""


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except (NameError, TypeError, AttributeError):
        # Hints that exist for type checkers only.
        return {}


def _options(hint: Any) -> set[Any]:
    """Returns the members of a union, or the one hint."""
    return set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}


_PLAIN = (int, float, bool, str, type(None))


def _fits(value: Any, hint: Any) -> bool:
    """Returns True if a value may go with the hint; only hints made of plain types can refuse.

    Mappings and lists are told by their methods: those of OmegaConf are no dicts and lists.
    """
    options = _options(hint)
    is_container = isinstance(value, (list, dict)) or type(value).__module__.startswith("omegaconf.")
    if not options <= set(_PLAIN) or not (isinstance(value, _PLAIN) or is_container):
        return True
    return type(value) in options or (type(value) is int and float in options)


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], owner: str = "") -> None:
    """Refuses values of another type than the hint of the same name says.

    Args:
        values: of a configuration, by name.
        hints: types by name; what has none may be anything.
        owner: what the names belong to, for the message.

    Raises:
        ConfigError: names the first one, and the types that it may have.
    """
    for name, value in values.items():
        if not _fits(value, hints.get(name)):
            expected = " or ".join(sorted(t.__name__.replace("NoneType", "null") for t in _options(hints[name])))
            got = "null" if value is None else repr(value)
            raise ConfigError(f"{owner}{name} must be {expected}, got {got}")


def check_arguments(cls: type, target: str, arguments: Mapping[str, Any], as_partial: bool = False) -> None:
    """Refuses arguments that a class does not take, that are of a wrong type, or that are missing.

    Args:
        cls: the class.
        target: its name in the configuration, for the message.
        arguments: by name.
        as_partial: let arguments be missing, since others follow.

    Raises:
        ConfigError: names the argument, and the nearest that the class takes.
    """
    try:
        parameters = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # **options goes to the base class, whose names are as good.
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
    check_types(arguments, _type_hints(cls), owner=f"{target}: ")
    if as_partial:
        return
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in arguments
    ]
    if missing:
        raise ConfigError(f"{target} needs the argument {', '.join(map(repr, missing))}")
