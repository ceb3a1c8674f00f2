"""The values that a user has set in a configuration: those of the command line and of files outside of lightkit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lightkit.app.schema import CONFIG_MODULE, config_loader

# The keys of a value from the top of the configuration, such as ("model", "num_classes").
KeyPath = tuple[str, ...]

_FILES_OF_LIGHTKIT = f"pkg://{CONFIG_MODULE}"


@dataclass(frozen=True)
class Origins:
    """The places that set the values of a composed configuration.

    Args:
        lightkits: the values that lightkit's own files set, by key path; a later file replaces those of an earlier one.
        users: the key paths of the values that the command line or a user's file sets.
        chosen: the groups whose choices the command line gives.
    """

    lightkits: dict[KeyPath, Any]
    users: set[KeyPath]
    chosen: set[str]

    def has_users_value(self, path: KeyPath) -> bool:
        """Returns True if the user has set the value under ``path`` or a value below it."""
        return any(own[: len(path)] == path for own in self.users)


def find_origins(config_name: str, overrides: Sequence[str]) -> Origins:
    """Returns the origins of the values in a configuration; reads the files again, in the order of the defaults list.

    Args:
        config_name: the name of the configuration.
        overrides: the overrides on the command line.
    """
    origins = Origins({}, set(), set())
    with config_loader() as loader:
        assert isinstance(loader, ConfigLoaderImpl)
        parsed, repository = loader._parse_overrides_and_create_caching_repo(config_name, list(overrides))
        found = create_defaults_list(
            repo=repository, config_name=config_name, overrides_list=parsed, prepend_hydra=True, skip_missing=True
        )
        origins.chosen.update(override.key_or_group for override in parsed if override not in found.config_overrides)
        for default in found.defaults:
            loaded = loader._load_single_config(default=default, repo=repository)
            values = dict(leaves(OmegaConf.to_container(loaded.config, resolve=False)))
            if loaded.provider == "hydra" or loaded.path == _FILES_OF_LIGHTKIT:
                origins.lightkits.update(values)
            else:
                origins.users.update(values)
    for override in found.config_overrides:
        if not override.is_delete():
            path = tuple(override.key_or_group.split("."))
            origins.users.update(path + below for below, _ in leaves(override.value()))
    return origins


def has_users_files() -> bool:
    """Returns True if the running job may have files from a directory or a package outside of lightkit and Hydra."""
    sources = HydraConfig.get().runtime.config_sources
    # Hydra names the directory of structured configurations by an empty path.
    return any(source.provider != "hydra" and source.path not in ("", CONFIG_MODULE) for source in sources)


def leaves(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the key path and the value of everything below ``node`` that is no mapping, or an empty one."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, (*path, str(key)))
    else:
        yield path, node
