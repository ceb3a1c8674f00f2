"""Records of runs, and the search for the run that ``ckpt_path=last`` means.

A run writes its record to ``.hydra/run.json``, beside Hydra's files, before the training and again at the end. The
first edition of lightkit wrote no record; for its runs the module reads Hydra's files instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.checksums import find_damage
from lightkit._util.directory_lock import is_held_by_another
from lightkit.errors import CheckpointError

_HYDRA_DIRECTORY = ".hydra"
_RECORD_FILE = Path(_HYDRA_DIRECTORY) / "run.json"

# A run may resume another one if these keys, and the choice of the group `debug`, are the same in both.
IDENTITY_KEYS = ("data", "model", "task", "seed")
_DEBUG_GROUP = "debug"

# The number of differences that an error message lists.
_MAX_DIFFERENCES = 8


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

    def write(self) -> None:
        """Writes the record to ``.hydra/run.json`` in the directory of the run."""
        content = {key: value for key, value in asdict(self).items() if key != "directory"}
        write_text_atomically(self.directory / _RECORD_FILE, json.dumps(content, indent=1, default=str))

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
    if HydraConfig.initialized():
        choices = _groups_of_lightkit(HydraConfig.get().runtime.choices)
    plain = json.loads(json.dumps(OmegaConf.to_container(config, resolve=False), default=str))
    return Run(directory, time.time(), plain, choices, job=job, older=_latest_checkpoint_time(directory))


def read(directory: Path) -> Run | None:
    """Returns the record of the run in a directory; None if the record is missing or unreadable."""
    try:
        return Run(directory, **json.loads((directory / _RECORD_FILE).read_text()))
    except FileNotFoundError:
        return _read_hydra_files(directory)
    except (OSError, ValueError, TypeError):
        return None


def find_run(checkpoint: Path) -> Run | None:
    """Returns the record of the run in whose directory ``checkpoint`` lies; None if there is no such run or record."""
    for directory in list(checkpoint.absolute().parents)[:3]:
        if (directory / _HYDRA_DIRECTORY).is_dir():
            return read(directory)
    return None


def has_runs(name: str) -> bool:
    """Returns True if a run lies below ``runs/<name>``."""
    return any(_run_directories(Path("runs") / name))


def find_candidates(run: Run, name: str, recorded: bool = False) -> list[Run]:
    """Returns the runs from which ``run`` might resume, the newest first.

    The candidates lie below ``runs/<name>`` or in the directory of ``run``. Jobs of the same sweep are no candidates.

    Args:
        run: the run that begins now.
        name: the name of the job.
        recorded: leave out runs of the first edition, whose files take long to read.
    """
    roots = (Path("runs") / name, run.directory)
    directories = {folder.resolve() for root in roots for folder in _run_directories(root)}
    if not (run.directory / _RECORD_FILE).exists():
        # Hydra has just written its files for the new run, which look like a run of the first edition.
        directories.discard(run.directory.resolve())
    if recorded:
        directories = {directory for directory in directories if (directory / _RECORD_FILE).exists()}
    records = [other for directory in directories if (other := read(directory)) is not None]
    candidates = [other for other in records if run.job is None or other.job != run.job]
    return sorted(candidates, key=lambda other: other.started, reverse=True)


def find_last(run: Run, name: str, swept: Sequence[str] = ()) -> Path:
    """Returns the checkpoint that ``ckpt_path=last`` means: that of the newest run without `config_differences`.

    Args:
        run: the run that begins now.
        name: the name of the job.
        swept: the keys and groups that differ between the jobs of the run's sweep, which must be the same too.

    Raises:
        CheckpointError: no run has such a checkpoint; the message has the nearest run and the differences.
    """
    root = Path("runs") / name
    candidates = find_candidates(run, name)
    same = [other for other in candidates if not config_differences(run, other, swept)]
    for other in same:
        if (path := other.latest_intact_checkpoint()) is not None:
            return path
    *most, last = *IDENTITY_KEYS, *swept
    keys = f"{', '.join(most)} and {last}"
    if same:
        raise CheckpointError(
            f"ckpt_path=last: {display_path(same[0].directory)} has the same {keys}, but no checkpoint to go on from: "
            "leave ckpt_path out to begin anew"
        )
    if not candidates:
        raise CheckpointError(f"ckpt_path=last: there is no last.ckpt below {root.absolute()}, nor another checkpoint")
    with_checkpoints = [other for other in candidates if other.checkpoints()]
    nearest = min(with_checkpoints or candidates, key=lambda other: len(config_differences(run, other, swept)))
    differences = config_differences(run, nearest, swept)
    differing = [f"{key}={theirs} there and {mine} here" for key, mine, theirs in differences]
    more = f"; and {len(differing) - _MAX_DIFFERENCES} more" if len(differing) > _MAX_DIFFERENCES else ""
    raise CheckpointError(
        f"ckpt_path=last: no run below {root.absolute()} has the same {keys}; the nearest is "
        f"{display_path(nearest.directory)}: {'; '.join(differing[:_MAX_DIFFERENCES])}{more}"
    )


def find_unfinished(run: Run, name: str) -> Run | None:
    """Returns the newest run below ``runs/<name>`` that has no `config_differences` from ``run``.

    Returns:
        The record of that run; None if there is none, or it is not resumable: see `Run.is_resumable`.
    """
    same = (other for other in find_candidates(run, name, recorded=True) if not config_differences(run, other))
    newest = next((other for other in same if other.is_finished or other.checkpoints()), None)
    return newest if newest is not None and newest.is_resumable() else None


def config_differences(mine: Run, theirs: Run, swept: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Returns the differences for which the run ``mine`` may not resume the run ``theirs``.

    The function compares the keys `IDENTITY_KEYS` and ``swept`` before interpolation, and the choice of the group
    ``debug``, since a run for debugging trains only a part.

    Returns:
        For each difference the key, the value of ``mine`` and the value of ``theirs``; the values as JSON.
    """
    values: list[tuple[str, Any, Any]] = []
    for key in (*IDENTITY_KEYS, *swept):
        if key not in IDENTITY_KEYS and (key in mine.choices or key in theirs.choices):
            values.append((key, mine.choices.get(key), theirs.choices.get(key)))
            continue
        here, there = (_flatten(_select(run.config, key), key) for run in (mine, theirs))
        for name in dict.fromkeys([*here, *there]):
            values.append((name, here.get(name), there.get(name)))
    values.append((f"+{_DEBUG_GROUP}", mine.choices.get(_DEBUG_GROUP), theirs.choices.get(_DEBUG_GROUP)))
    return [(name, json.dumps(here), json.dumps(there)) for name, here, there in values if not _is_equal(here, there)]


def display_path(path: Path) -> str:
    """Returns ``path`` relative to the current directory, or unchanged if it lies outside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _is_equal(one: Any, other: Any) -> bool:
    # NaN differs from itself; its JSON does not.
    return one == other or json.dumps(one) == json.dumps(other)


def _select(config: Any, key: str) -> Any:
    """Returns the value in ``config`` under the dotted key of an override, such as ``model.dim``; None without one."""
    for part in key.partition("@")[0].lstrip("+~").split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _flatten(node: Any, prefix: str) -> dict[str, Any]:
    """Returns the values at and below ``node`` that are no dicts, by dotted key; each key begins with ``prefix``."""
    if isinstance(node, dict) and node:
        return {name: value for key, part in node.items() for name, value in _flatten(part, f"{prefix}.{key}").items()}
    return {prefix: node}


def _groups_of_lightkit(choices: Any) -> dict[str, str]:
    """Returns the choice of each group in ``choices``, by the name of the group, except Hydra's own groups."""
    return {str(group): choice for group, choice in choices.items() if not str(group).startswith("hydra/")}


def _run_directories(root: Path) -> Iterator[Path]:
    """Yields the run directories at and below ``root``."""
    for folder, folders, _ in os.walk(root):
        if _HYDRA_DIRECTORY in folders:
            yield Path(folder)
        folders[:] = [name for name in folders if name[0] != "." and name not in ("checkpoints", "tensorboard")]


def _find_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints in a run directory, the latest first; ``last.ckpt`` first among those of one time."""
    paths: list[Path] = []
    for folder, folders, files in os.walk(directory):
        parent = Path(folder)
        # The directories of other runs may lie below this one.
        folders[:] = [name for name in folders if name[0] != "." and not (parent / name / _HYDRA_DIRECTORY).is_dir()]
        paths += [parent / name for name in files if name.endswith(".ckpt") and name[0] != "."]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), reverse=True)


def _latest_checkpoint_time(directory: Path) -> int:
    return max((path.stat().st_mtime_ns for path in _find_checkpoints(directory)), default=0)


def _read_hydra_files(directory: Path) -> Run | None:
    """Returns the record of a run of the first edition; None if one of Hydra's files is missing or unreadable."""
    folder = directory / _HYDRA_DIRECTORY
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
        choices = OmegaConf.load(folder / "hydra.yaml").hydra.runtime.choices
        overrides = [str(word) for word in OmegaConf.load(folder / "overrides.yaml")]
        started = (folder / "config.yaml").stat().st_mtime
        plain = json.loads(json.dumps(config, default=str))
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
        return "wall_seconds" in json.loads((directory / "metrics.json").read_text())
    except (OSError, ValueError, TypeError):
        return False
