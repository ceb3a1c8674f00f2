"""The files of a run directory besides checkpoints and logs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lightkit import __version__, native
from lightkit._util.atomic_write import write_text_atomically
from lightkit.errors import ConfigError

# The names of the files in the directory of a run.
CONFIG, ENVIRONMENT, METRICS, LOG = "config.yaml", "environment.json", "metrics.json", "metrics.csv"

_PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "numpy")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as indented JSON to the file ``path``."""
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def read_if_newer(path: Path, than: Path) -> dict[str, Any]:
    """Returns the content of a file that `write_json` wrote, if the file is not older than another one.

    Args:
        path: the file.
        than: the other file.

    Returns:
        The content; an empty dict if ``path`` is missing, damaged or older than ``than``.
    """
    try:
        is_newer = path.stat().st_mtime_ns >= than.stat().st_mtime_ns
        return json.loads(path.read_text()) if is_newer else {}
    except (OSError, ValueError):
        return {}


def check_output(path: str | None) -> None:
    """Rejects an output file that cannot be written, before a command does the work.

    Args:
        path: the file; None for no output.

    Raises:
        ConfigError: the parent directory does not exist, or ``path`` is a directory.
    """
    if path is None:
        return
    file = Path(path).absolute()
    if not file.parent.is_dir():
        raise ConfigError(f"output={path}: there is no directory {file.parent}")
    if file.is_dir():
        raise ConfigError(f"output={path} is a directory, and must be a file")


def write_config(directory: Path, config: DictConfig) -> None:
    """Writes the resolved configuration to ``config.yaml`` in ``directory``."""
    write_text_atomically(directory / CONFIG, OmegaConf.to_yaml(config, resolve=True))


def environment() -> dict[str, Any]:
    """Returns the versions of packages and the properties of the machine, by name."""
    facts: dict[str, Any] = {"lightkit": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["native_kernels"] = [device for device in ("cpu", "cuda") if native.available(device)]
    facts["platform"] = platform.platform()
    facts["cpu"] = _cpu_name()
    facts["cores"] = os.cpu_count()
    facts["threads"] = torch.get_num_threads()
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
