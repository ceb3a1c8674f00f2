"""From configuration to objects: the one place that turns a ``_target_`` into an instance."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightkit.errors import ConfigError

# A configuration may build classes of these packages and of no others: it is data, often somebody else's,
# and must not be able to call os.system.
_TRUSTED = ["lightkit", "lightning.pytorch", "lightning.fabric", "torch.nn", "torch.optim", "torchmetrics"]

_TARGET, _PARTIAL = "_target_", "_partial_"


def allow_targets(*packages: str) -> None:
    """Lets configurations build classes of further packages, such as a user's own.

    The environment variable ``LIGHTKIT_TARGETS`` does the same for the command line: names of packages,
    separated by commas.
    """
    _TRUSTED.extend(packages)


def _trusted_packages() -> list[str]:
    return _TRUSTED + [name.strip() for name in os.environ.get("LIGHTKIT_TARGETS", "").split(",") if name.strip()]


def build(config: Any, **extra: Any) -> Any:
    """Builds what a configuration describes, from the inside out.

    A mapping with ``_target_`` becomes an instance of that class, with the other keys as its arguments; with
    ``_partial_: true`` a callable that takes the rest. Other mappings and lists become dicts and lists.

    Args:
        config: a configuration node, or plain containers.
        **extra: further arguments of the outermost target.

    Raises:
        ConfigError: an unknown or untrusted target, or arguments that it does not take; names the nearest.
    """
    if isinstance(config, (DictConfig, ListConfig)):
        config = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if isinstance(config, Mapping):
        values = {key: build(value) for key, value in config.items() if key not in (_TARGET, _PARTIAL)}
        if _TARGET not in config:
            return {**values, **extra}
        if config[_TARGET] is None:
            return None
        if taken := values.keys() & extra.keys():
            raise ConfigError(
                f"{config[_TARGET]}: {', '.join(sorted(taken))} cannot be set here, it has keys of its own"
            )
        return _instantiate(str(config[_TARGET]), {**values, **extra}, bool(config.get(_PARTIAL, False)))
    if isinstance(config, (list, tuple)):
        return [build(value) for value in config]
    return config


def _instantiate(target: str, arguments: dict[str, Any], as_partial: bool) -> Any:
    cls = find_class(target)
    _check_arguments(cls, target, arguments, as_partial)
    factory = partial(_construct, cls, target, **arguments)
    return factory if as_partial else factory()


def _construct(cls: type, target: str, /, *positional: Any, **arguments: Any) -> Any:
    try:
        return cls(*positional, **arguments)
    except ImportError as error:
        # Mostly one of the packages that the extra brings; said in the words of whoever missed it.
        raise ConfigError(f"{target} could not be built: {error}; pip install 'lightkit[app]'") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target} could not be built: {error}") from error


def find_class(target: str) -> type:
    """The class that a ``_target_`` names.

    Raises:
        ConfigError: it is not in a trusted package, does not exist, or is not a class.
    """
    trusted = _trusted_packages()
    if "." not in target.strip(".") or not _is_within(target, trusted):
        raise ConfigError(
            f"_target_: {target} is not in a package that a configuration may use ({', '.join(trusted)}); "
            "add your own with LIGHTKIT_TARGETS=PACKAGE or lightkit.config.allow_targets"
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise ConfigError(f"_target_: {target} needs the package {error.name}, which is not installed") from error
        raise ConfigError(f"_target_: there is no module {module_name}{_nearest_target(target)}") from error
    found = getattr(module, name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"_target_: {module_name} has no {name}{nearest(name, classes, prefix=module_name + '.')}")
    # Where it is defined counts, not where it was found: trusted modules import all sorts of things.
    if not inspect.isclass(found) or not _is_within(found.__module__, trusted):
        raise ConfigError(f"_target_: {target} is not a class of a trusted package")
    return found


def _is_within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _nearest_target(target: str) -> str:
    """For a misspelt module: the nearest public module of lightkit or torch that has such a class."""
    name = target.rpartition(".")[2]
    modules = (
        "lightkit.models",
        "lightkit.tasks",
        "lightkit.data",
        "lightkit.optim",
        "lightkit.nn",
        "lightkit.callbacks",
    )
    known = [
        f"{m}.{c}"
        for m in (*modules, "torch.optim", "torch.nn")
        for c in getattr(importlib.import_module(m), "__all__", [])
    ]
    return nearest(target, known) or nearest(name, known)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`"; did you mean a, b?"` with the known names that are close to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(prefix + c for c in close)}?" if close else ""


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except (NameError, TypeError, AttributeError):
        # Hints that exist for type checkers only.
        return {}


def _options(hint: Any) -> set[Any]:
    """The members of a union, or the one hint."""
    return set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}


_PLAIN = (int, float, bool, str, type(None))
_CONTAINERS = (list, dict, ListConfig, DictConfig)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration may go with this hint; only hints made of plain types can refuse."""
    options = _options(hint)
    if not options <= set(_PLAIN) or not isinstance(value, _PLAIN + _CONTAINERS):
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


def _check_arguments(cls: type, target: str, arguments: dict[str, Any], as_partial: bool) -> None:
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
