"""Construction of objects from a user's configuration, in which ``_target_`` names a class."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightkit._util.imported import is_instance
from lightkit._util.installation import how_to_install
from lightkit.errors import ConfigError
from lightkit.targets import allow_targets, check_arguments, check_types, find_class, nearest

__all__ = ["SIZE_KEYS", "allow_targets", "build", "check_types", "construct", "find_class", "nearest"]

# The arguments of a model that follow the data where a configuration has null: see `lightkit.data.with_sizes`.
SIZE_KEYS = ("in_channels", "image_size", "input_size", "category_sizes", "num_classes", "num_outputs")

_TARGET, _PARTIAL = "_target_", "_partial_"


def to_plain(config: Any) -> Any:
    """Returns a container of OmegaConf as resolved dicts and lists; returns any other object unchanged.

    The function does not import OmegaConf: while nobody has imported it, no object is a container of OmegaConf. A
    missing value (``???``) raises OmegaConf's ``MissingMandatoryValue``.
    """
    if not (is_instance(config, "omegaconf", "DictConfig") or is_instance(config, "omegaconf", "ListConfig")):
        return config
    return sys.modules["omegaconf"].OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def build(config: Any, **extra: Any) -> Any:
    """Builds the objects that a configuration describes, the innermost first.

    A mapping with ``_target_`` becomes an instance of that class, with the other keys as arguments. With
    ``_partial_: true`` it becomes a callable that accepts the missing arguments. Other mappings and lists become dicts
    and lists. The user must trust the configuration; `lightkit.app.restore` builds from the configuration in a
    checkpoint.

    Args:
        config: a configuration of OmegaConf, or plain containers.
        **extra: further arguments of the outermost class, by name; the configuration must not set them. Without a
            ``_target_`` they become keys of the returned dict.

    Returns:
        The object that ``config`` describes; None if its ``_target_`` is null.

    Raises:
        ConfigError: a class is unknown or not allowed (see `lightkit.targets`), or it does not accept an argument; the
            message has the nearest known names.
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
                f"{config[_TARGET]}: {', '.join(sorted(taken))} cannot be set here, because the program sets it"
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
    """Returns an instance of a class, made with the arguments of a configuration.

    Args:
        cls: the class.
        target: the name of the class in the configuration, for the message.
        *positional: positional arguments.
        **arguments: keyword arguments.

    Raises:
        ConfigError: the constructor raised an ImportError, a TypeError or a ValueError; the message has ``target`` and
            the constructor's message.
    """
    try:
        return cls(*positional, **arguments)
    except ImportError as error:
        # The missing package mostly belongs to the extra `app`.
        raise ConfigError(f"{target} could not be built: {error}; {how_to_install('app')}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{target} could not be built: {error}") from error
