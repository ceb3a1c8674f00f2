"""The files of a run directory besides checkpoints and logs."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lightkit import __version__, native
from lightkit._util import strict_json
from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.working_copy import git_state
from lightkit.app.run_records import CONFIG, ENVIRONMENT, LOG, METRICS
from lightkit.errors import ConfigError

__all__ = [
    "CONFIG",
    "ENVIRONMENT",
    "LOG",
    "METRICS",
    "check_output",
    "environment",
    "read_if_newer",
    "write_config",
    "write_json",
]

_PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "numpy")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as indented JSON to the file ``path``; NaN and infinities, which JSON lacks, become null."""
    write_text_atomically(path, strict_json.dumps(content, indent=2) + "\n")


def read_if_newer(path: Path, than: Path) -> dict[str, Any]:
    """Returns the metrics in a file that `write_json` wrote, if the file is not older than another one.

    Args:
        path: the file.
        than: the other file.

    Returns:
        The metrics by name, with NaN for null; an empty dict if ``path`` is missing, damaged or older than ``than``.
    """
    try:
        is_newer = path.stat().st_mtime_ns >= than.stat().st_mtime_ns
        metrics = json.loads(path.read_text()) if is_newer else {}
        return {name: math.nan if value is None else value for name, value in metrics.items()}
    except (OSError, ValueError, AttributeError):
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
    """Returns the versions of packages, the commit of the current directory, and the properties of the machine."""
    facts: dict[str, Any] = {"lightkit": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["git"] = git_state()
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
