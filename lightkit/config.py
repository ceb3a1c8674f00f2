"""From configuration to objects: the one place that turns a ``_target_`` of the user's into an instance."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightkit._util.imported import is_instance
from lightkit._util.installation import how_to_install
from lightkit.errors import ConfigError
from lightkit.targets import allow_targets, check_arguments, check_types, find_class, nearest

__all__ = ["allow_targets", "build", "check_types", "construct", "find_class", "nearest"]

_TARGET, _PARTIAL = "_target_", "_partial_"


def to_plain(config: Any) -> Any:
    """Returns OmegaConf's containers as dicts and lists, resolved; returns anything else as it is.

    While nobody has imported OmegaConf, no container is OmegaConf's: a library does not need the package.
    """
    if not (is_instance(config, "omegaconf", "DictConfig") or is_instance(config, "omegaconf", "ListConfig")):
        return config
    return sys.modules["omegaconf"].OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def build(config: Any, **extra: Any) -> Any:
    """Builds what a configuration describes, from the inside out.

    A mapping with ``_target_`` becomes an instance of that class, with the other keys as its arguments; with
    ``_partial_: true`` a callable that takes the rest. Other mappings and lists become dicts and lists. The
    configuration must be the user's own: what is inside a checkpoint is built by `lightkit.restore`.

    Args:
        config: a configuration node, or plain containers.
        **extra: further arguments of the outermost target.

    Raises:
        ConfigError: a target that is unknown or that a configuration may not use, see `lightkit.targets`, or
            arguments that it does not take; names the nearest.
    """
    config = to_plain(config)
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
    check_arguments(cls, target, arguments, as_partial)
    factory = partial(construct, cls, target, **arguments)
    return factory if as_partial else factory()


def construct(cls: type, target: str, /, *positional: Any, **arguments: Any) -> Any:
    """Calls a class with arguments of a configuration.

    Raises:
        ConfigError: the class refuses them; in its words, with ``target`` before them.
    """
    try:
        return cls(*positional, **arguments)
    except ImportError as error:
        # Mostly one of the packages that the extra brings; said in the words of whoever missed it.
        raise ConfigError(f"{target} could not be built: {error}; {how_to_install('app')}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target} could not be built: {error}") from error
