"""What a run leaves in its directory besides checkpoints and logs."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightkit import __version__, native
from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.printable import printable
from lightkit.errors import ConfigError

_PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "numpy")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a dict as indented JSON."""
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def read_if_newer(path: Path, than: Path) -> dict[str, Any]:
    """What `write_json` wrote, if that was after another file; else nothing."""
    try:
        is_newer = path.stat().st_mtime_ns >= than.stat().st_mtime_ns
        return json.loads(path.read_text()) if is_newer else {}
    except (OSError, ValueError):
        return {}


def check_output(path: str | None) -> None:
    """Refuses a file that cannot be written before the work is done that it is to hold."""
    if path is None:
        return
    file = Path(path).absolute()
    if not file.parent.is_dir():
        raise ConfigError(f"output={path}: there is no directory {file.parent}")
    if file.is_dir():
        raise ConfigError(f"output={path} is a directory, and must be a file")


def write_config(run_dir: Path, config: DictConfig) -> None:
    """``config.yaml``: the configuration with everything resolved."""
    write_text_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True))


def environment() -> dict[str, Any]:
    """Versions and machine."""
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


def print_table(title: str, rows: dict[str, str]) -> None:
    """Prints a short table of names and values, which may be somebody else's, on standard output."""
    # As texts: in plain strings rich looks for its markup.
    table = Table(title=Text(printable(title), style="table.title"), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    # Paths must come out whole, to be copied.
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console().print(table)
