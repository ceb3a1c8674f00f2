"""What the commands change in Hydra: files are never half written, and groups are listed without copying them all."""

from __future__ import annotations

from pathlib import Path

import hydra.core.utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from lightkit._util.atomic_write import write_text_atomically

_get_group_options = ConfigLoaderImpl.get_group_options


def change_hydra() -> None:
    """Makes the changes in this process; to call it again changes nothing."""
    hydra.core.utils._save_config = _save_atomically
    ConfigLoaderImpl.get_group_options = _get_group_options_at_once


def _save_atomically(config: DictConfig, filename: str, output_dir: Path) -> None:
    """Writes ``.hydra/*.yaml`` in Hydra's place, which leaves an empty file when it is killed or the disk is full."""
    write_text_atomically(output_dir / filename, OmegaConf.to_yaml(config))


def _get_group_options_at_once(
    loader: ConfigLoaderImpl,
    group_name: str,
    results_filter: ObjectType | None = ObjectType.CONFIG,
    config_name: str | None = None,
    overrides: list[str] | None = None,
) -> list[str]:
    """Lists a group as Hydra does, which copies every file that it has read first, for overrides that may change paths.

    ``--help`` asks a hundred times.
    """
    if config_name is None and not overrides:
        return loader.repository.get_group_options(group_name, results_filter)
    return _get_group_options(loader, group_name, results_filter, config_name, overrides)
