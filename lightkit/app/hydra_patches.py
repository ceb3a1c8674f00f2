"""Patches of Hydra: atomic writes of its files, and a faster list of a group's choices."""

from __future__ import annotations

from pathlib import Path

import hydra.core.utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from lightkit._util.atomic_write import write_text_atomically

_get_group_options = ConfigLoaderImpl.get_group_options


def patch_hydra() -> None:
    """Patches Hydra in this process; a second call changes nothing."""
    hydra.core.utils._save_config = _save_atomically
    ConfigLoaderImpl.get_group_options = _get_group_options_uncopied


def _save_atomically(config: DictConfig, filename: str, output_dir: Path) -> None:
    """Writes ``config`` to ``.hydra/<filename>`` atomically.

    Hydra's own function leaves an empty file if the process is killed or the disk is full.
    """
    write_text_atomically(output_dir / filename, OmegaConf.to_yaml(config))


def _get_group_options_uncopied(
    self: ConfigLoaderImpl,
    group_name: str,
    results_filter: ObjectType | None = ObjectType.CONFIG,
    config_name: str | None = None,
    overrides: list[str] | None = None,
) -> list[str]:
    """Returns the choices of a group without copying the loader's cache, as Hydra does at each call.

    The parameters are those of Hydra's method. Hydra needs the copy only for overrides that change the search path.
    ``--help`` asks for the choices of a hundred groups.
    """
    if config_name is None and not overrides:
        return self.repository.get_group_options(group_name, results_filter)
    return _get_group_options(self, group_name, results_filter, config_name, overrides)
