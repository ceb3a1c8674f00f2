"""Records of runs: what a run was, how it ended, and which checkpoints it wrote.

A run writes its record to ``.hydra/run.json``, beside Hydra's files, before the training and again at the end. The
first edition of lightkit wrote no record; for its runs the module reads Hydra's files instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightkit._util import strict_json
from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.checksums import find_damage
from lightkit._util.directory_lock import is_held_by_another

HYDRA_DIRECTORY = ".hydra"
RECORD_FILE = Path(HYDRA_DIRECTORY) / "run.json"

# The names of the files in the directory of a run.
CONFIG, ENVIRONMENT, METRICS, LOG, REPORT, OUTPUT = (
    "config.yaml",
    "environment.json",
    "metrics.json",
    "metrics.csv",
    "report.html",
    "train.log",
)


@dataclass(frozen=True)
class Run:
    """The record of a run.

    Args:
        directory: the directory of the run.
        started: the time of the latest start, in seconds since the epoch.
        config: the configuration before interpolation.
        choices: the choice of each group of the configuration, by the name of the group.
        overrides: the run's overrides on the command line, without ``ckpt_path``.
        job: the id of the sweep, or of the job of torchrun, that the run belongs to; None for a single run.
        older: the modification time, in nanoseconds since the epoch, of the latest checkpoint in the directory that
            another run wrote; 0 if there is none.
        is_finished: True if the run has written its report.
        result: the objective that a sweeper gets; None without one.
        error: the error that ended the run; None without one, as after a kill.
    """

    directory: Path
    started: float
    config: dict[str, Any]
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    job: str | None = None
    older: int = 0
    is_finished: bool = False
    result: float | None = None
    error: str | None = None

    def write(self) -> None:
        """Writes the record to ``.hydra/run.json`` in the directory of the run."""
        content = {key: value for key, value in asdict(self).items() if key != "directory"}
        write_text_atomically(self.directory / RECORD_FILE, strict_json.dumps(content, indent=1, as_text=True))

    def finished(self, result: float | None) -> Run:
        """Returns a copy of this record as that of a finished run.

        Args:
            result: the objective that a sweeper gets; None without one.
        """
        return replace(self, is_finished=True, result=result)

    def checkpoints(self) -> list[Path]:
        """Returns the paths of the checkpoints that the run wrote, the latest first."""
        return [path for path in _find_checkpoints(self.directory) if path.stat().st_mtime_ns > self.older]

    def latest_intact_checkpoint(self) -> Path | None:
        """Returns the path of the latest undamaged checkpoint.

        Returns:
            The path. If every checkpoint is damaged, the latest one, since loading it explains the damage. None if the
            run has no checkpoint.
        """
        paths = self.checkpoints()
        for path in paths:
            if (damage := find_damage(path)) is None:
                return path
            print(f"{display_path(path)} is damaged ({damage}): it is passed over", file=sys.stderr)
        return paths[0] if paths else None

    def is_resumable(self) -> bool:
        """Returns True if the run is unfinished, has a checkpoint, and no other process writes to its directory."""
        return not self.is_finished and bool(self.checkpoints()) and not is_held_by_another(self.directory)


def describe(config: DictConfig, job: str | None = None) -> Run:
    """Returns the record of the run that begins now.

    Args:
        config: the configuration before interpolation.
        job: the id of the sweep, or of the job of torchrun, that the run belongs to; None for a single run.
    """
    directory = Path(config.run_dir).absolute()
    choices: dict[str, str] = {}
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        choices = _groups_of_lightkit(HydraConfig.get().runtime.choices)
    plain = json.loads(strict_json.dumps(OmegaConf.to_container(config, resolve=False), as_text=True))
    return Run(directory, time.time(), plain, choices, job=job, older=_latest_checkpoint_time(directory))


def rewrite_hydra_config(config: DictConfig) -> None:
    """Replaces Hydra's record of the composed configuration, ``.hydra/config.yaml``, by ``config``."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if hydra.output_subdir is not None:
        record = Path(hydra.runtime.output_dir) / hydra.output_subdir / "config.yaml"
        write_text_atomically(record, OmegaConf.to_yaml(config))


def read(directory: Path) -> Run | None:
    """Returns the record of the run in a directory; None if the record is missing or unreadable."""
    try:
        run = Run(directory, **json.loads((directory / RECORD_FILE).read_text()))
        # A result that is no finite number is a text in JSON.
        return replace(run, result=None if run.result is None else float(run.result))
    except FileNotFoundError:
        return _read_hydra_files(directory)
    except (OSError, ValueError, TypeError):
        return None


def find_run(checkpoint: Path) -> Run | None:
    """Returns the record of the run in whose directory ``checkpoint`` lies; None if there is no such run or record."""
    for directory in list(checkpoint.absolute().parents)[:3]:
        if (directory / HYDRA_DIRECTORY).is_dir():
            return read(directory)
    return None


def find_results(directory: Path) -> list[str]:
    """Returns the names of the files in a directory that a new run would overwrite and that somebody may need.

    A run that failed before its first step leaves only its configuration, which the next attempt may replace. The
    result has no empty files.
    """
    names = [METRICS, LOG, REPORT]
    if not (directory / RECORD_FILE).exists():
        # Without a record the files are not those of a run that failed: they may be anybody's.
        names += [CONFIG, ENVIRONMENT]
    found = [directory / name for name in names]
    found += sorted([*directory.glob("*.ckpt"), *directory.glob("checkpoints/*.ckpt")])
    return [str(path.relative_to(directory)) for path in found if path.exists() and not is_empty(path)]


def is_empty(path: Path) -> bool:
    """Returns True for a file without content."""
    return path.is_file() and path.stat().st_size == 0


def display_path(path: Path) -> str:
    """Returns ``path`` relative to the current directory, or unchanged if it lies outside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _groups_of_lightkit(choices: Any) -> dict[str, str]:
    """Returns the choice of each group in ``choices``, by the name of the group, except Hydra's own groups."""
    return {str(group): choice for group, choice in choices.items() if not str(group).startswith("hydra/")}


def run_directories(root: Path) -> Iterator[Path]:
    """Yields the run directories at and below ``root``."""
    for folder, folders, _ in os.walk(root):
        if HYDRA_DIRECTORY in folders:
            yield Path(folder)
        folders[:] = [name for name in folders if name[0] != "." and name not in ("checkpoints", "tensorboard")]


def _find_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints in a run directory, the latest first; ``last.ckpt`` first among those of one time."""
    paths: list[Path] = []
    for folder, folders, files in os.walk(directory):
        parent = Path(folder)
        # The directories of other runs may lie below this one.
        folders[:] = [name for name in folders if name[0] != "." and not (parent / name / HYDRA_DIRECTORY).is_dir()]
        paths += [parent / name for name in files if name.endswith(".ckpt") and name[0] != "."]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), reverse=True)


def _latest_checkpoint_time(directory: Path) -> int:
    return max((path.stat().st_mtime_ns for path in _find_checkpoints(directory)), default=0)


def _read_hydra_files(directory: Path) -> Run | None:
    """Returns the record of a run of the first edition; None if one of Hydra's files is missing or unreadable."""
    folder = directory / HYDRA_DIRECTORY
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
        choices = OmegaConf.load(folder / "hydra.yaml").hydra.runtime.choices
        overrides = [str(word) for word in OmegaConf.load(folder / "overrides.yaml")]
        started = (folder / "config.yaml").stat().st_mtime
        plain = json.loads(strict_json.dumps(config, as_text=True))
    except Exception:
        # YAML and OmegaConf raise many types of errors for an empty or damaged file.
        return None
    if not isinstance(plain, dict) or not plain:
        return None
    is_finished = _has_final_metrics(directory)
    return Run(directory, started, plain, _groups_of_lightkit(choices), overrides, is_finished=is_finished)


def _has_final_metrics(directory: Path) -> bool:
    """Returns True if ``metrics.json`` has the wall time, which a run writes just before its report."""
    try:
        return "wall_seconds" in json.loads((directory / METRICS).read_text())
    except (OSError, ValueError, TypeError):
        return False
