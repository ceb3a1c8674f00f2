"""Profilers of Lightning by one word, whose files lie in the run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from lightkit._util.printable import printable
from lightkit.config import build
from lightkit.errors import ConfigError
from lightkit.targets import nearest

_PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}

_FILE = "profile"

# The numbers of lines of a profile that are printed, of characters of a line, and of characters of an action's name.
_LINES, _WIDTH, _NAME_WIDTH = 25, 160, 60

# The part of the report of an AdvancedProfiler that is printed.
_TRAINING_STEPS = "Profile stats for: run_training_batch"


def build_profiler(value: Any, run_dir: str | Path) -> Profiler | None:
    """Returns the profiler that the key ``trainer.profiler`` describes.

    Args:
        value: one of the words ``simple``, ``advanced`` and ``pytorch``, the configuration of a profiler, or None.
        run_dir: the directory of the run, in which the profile of a training is ``fit-profile.txt``.

    Raises:
        ConfigError: there is no such profiler.
    """
    if value is None or isinstance(value, dict):
        return build(value)
    if value not in _PROFILERS:
        raise ConfigError(
            f"trainer.profiler must be {', '.join(_PROFILERS)} or null, got {value!r}{nearest(str(value), _PROFILERS)}"
        )
    return _PROFILERS[value](dirpath=run_dir, filename=_FILE)


def print_profile(trainer: pl.Trainer, run_dir: Path) -> None:
    """Prints the head of the profile that the training has written to the run directory, and its path.

    Args:
        trainer: the trainer after a training; only its process 0 prints.
        run_dir: the directory of the run.
    """
    profiler: Any = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
    if not trainer.is_global_zero or getattr(profiler, "filename", None) != _FILE:
        return
    rank = "-0" if trainer.world_size > 1 else ""
    path = run_dir / f"fit-{_FILE}{rank}.txt"
    if not path.is_file():
        return
    lines = [_shorten(line) for line in path.read_text(errors="replace").splitlines() if line.strip(" -\t")]
    start = next((i for i, line in enumerate(lines) if line.startswith(_TRAINING_STEPS)), 0)
    print("\n".join(lines[start : start + _LINES]))
    print(f"the whole profile: {os.path.relpath(path)}", flush=True)


def _shorten(line: str) -> str:
    """Returns a line of a profile with at most `_WIDTH` characters; a SimpleProfiler pads names to the longest one."""
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    if len(cells) < 3:
        return printable(line.rstrip()[:_WIDTH])
    name = cells[0] if len(cells[0]) <= _NAME_WIDTH else f"{cells[0][: _NAME_WIDTH - 3]}..."
    return printable(f"{name:<{_NAME_WIDTH}}" + "".join(f"{cell:>16}" for cell in cells[1:]))
