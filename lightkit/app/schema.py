"""The keys and groups of a configuration, and the check of its top-level keys."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightkit.config import to_plain
from lightkit.errors import ConfigError
from lightkit.targets import nearest

CONFIG_MODULE = "lightkit.conf"

# The limit of the usual file systems.
_MAX_NAME_BYTES = 255


@contextmanager
def config_loader() -> Iterator[ConfigLoader]:
    """Yields Hydra's loader: that of the running command, or a new one after the command ended in an error."""
    if GlobalHydra.instance().is_initialized():
        yield GlobalHydra.instance().config_loader()
    else:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            yield GlobalHydra.instance().config_loader()


def check_top_level(config: Mapping[str, Any], config_name: str) -> None:
    """Rejects unknown and missing top-level keys, which Hydra's ``+key=value`` and ``~key`` would allow.

    Args:
        config: the composed configuration.
        config_name: the name of the configuration.

    Raises:
        ConfigError: a key is unknown or missing; the message names the key and the nearest known ones.
    """
    known, groups, optional = top_level(config_name)
    # Iteration yields the key of a missing value (???); for that key `in` is False.
    if missing := set(known).difference(map(str, config), optional):
        raise ConfigError(f"the configuration needs {', '.join(sorted(missing))}, which cannot be removed")
    for key in config:
        if key not in known:
            raise ConfigError(f"{key!r} is not a key of the configuration{nearest(str(key), [*known, *groups])}")


def check_name(name: str) -> None:
    """Rejects a name of a job that cannot be a directory below ``runs``.

    Args:
        name: the value of the key ``name``; ``a/b`` makes ``runs/a/b``.

    Raises:
        ConfigError: the directory would lie outside ``runs``, or no file system or configuration can hold the name.
    """
    parts = name.split("/")
    is_control = any(unicodedata.category(character) == "Cc" for character in name)
    # An interpolation in the directory that Hydra makes of the name would be resolved a second time.
    if not name.strip() or {"", ".", ".."} & set(parts) or is_control or "${" in name:
        raise ConfigError(
            f"name={name}: the runs lie in runs/NAME, so that NAME must be the name of a directory below runs"
        )
    if max(len(part.encode("utf-8", "surrogatepass")) for part in parts) > _MAX_NAME_BYTES:
        raise ConfigError(f"name={name}: the name of a directory has at most {_MAX_NAME_BYTES} bytes")


def set_tags(config: DictConfig) -> None:
    """Makes the key ``tags`` a list of texts: a single tag becomes a list, and a number becomes a text.

    Args:
        config: the composed configuration, which the function changes.

    Raises:
        ConfigError: ``tags`` is neither, or a tag is empty.
    """
    value = to_plain(config.get("tags"))
    tags = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(tag, (str, int, float)) and str(tag).strip() for tag in tags):
        raise ConfigError(f"tags must be a list of words, such as tags=[baseline,small], got {value!r}")
    config.tags = [str(tag).strip() for tag in tags]


def top_level(config_name: str) -> tuple[list[str], list[str], list[str]]:
    """Returns the top-level names of a configuration.

    Args:
        config_name: the name of the configuration.

    Returns:
        The top-level keys with the groups in the defaults; the names of all groups; and the keys and groups that may be
        missing.
    """
    with config_loader() as loader:
        return _top_level(loader, config_name)


@functools.lru_cache(maxsize=1)
def _top_level(loader: ConfigLoader, config_name: str) -> tuple[list[str], list[str], list[str]]:
    # The function reads the file and does not compose it, because composing is the slowest step before a sweep's job.
    primary = _repository(loader).load_config(config_name)
    assert primary is not None, config_name
    defaults = [default.group for default in primary.defaults_list or [] if isinstance(default, GroupDefault)]
    known = [*map(str, primary.config), *(group for group in defaults if group is not None and "/" not in group)]
    groups = loader.list_groups("")
    # Hydra removes its own key before it calls the job; a group that has the choice `none` may be missing.
    return known, groups, ["hydra", *(group for group in groups if "none" in loader.get_group_options(group))]


def _repository(loader: ConfigLoader) -> IConfigRepository:
    # The abstract class has no accessor for the repository.
    assert isinstance(loader, ConfigLoaderImpl)
    return loader.repository


def default_config(loader: ConfigLoader, config_name: str) -> DictConfig:
    """Returns the configuration ``config_name``, composed by ``loader`` without overrides."""
    return loader.load_configuration(config_name, overrides=[], run_mode=RunMode.RUN)


def override_names(config_name: str) -> list[str]:
    """Returns every name that an override of ``config_name`` may set: the dotted keys and the groups."""
    with config_loader() as loader:
        keys = _dotted(OmegaConf.to_container(default_config(loader, config_name)))
        return list(dict.fromkeys([*keys, *loader.list_groups("")]))


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of nested dicts, each after ``prefix``."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield prefix + str(key)
            yield from _dotted(value, f"{prefix}{key}.")
