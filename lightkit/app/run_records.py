"""What each run records of itself in its directory, and the search for the run that ``ckpt_path=last`` means.

The record is ``.hydra/run.json``, beside Hydra's own account of the configuration. It is written before the training
begins, and again at the end of the run. Runs of the first edition have none: Hydra's files stand in for it.
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

from lightkit._util.atomic_write import is_held_by_another, write_text_atomically
from lightkit.checkpoints.checksums import find_damage
from lightkit.errors import CheckpointError

_HYDRA = ".hydra"
_RECORD = Path(_HYDRA) / "run.json"

# What two runs have in common of which one goes on with the other: these keys, and whether it is for debugging.
SAME = ("data", "model", "task", "seed")
_DEBUG = "debug"

# Differences that an error has room for.
_SHOWN = 8


@dataclass(frozen=True)
class Run:
    """A run, as its record has it.

    Args:
        directory: of the run.
        started: when it was begun, or begun again; seconds of the epoch.
        config: the configuration before interpolation.
        choices: what was chosen of each group of the configuration.
        overrides: the words of the command line that are this run's, without ``ckpt_path``.
        job: names the sweep, or the job of torchrun, that the run is one of.
        older: time in ns of the latest checkpoint in the directory that is not of this run.
        is_finished: whether the run has come to its report.
        result: the figure that a sweeper gets.
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
        """Writes the record."""
        content = {key: value for key, value in asdict(self).items() if key != "directory"}
        write_text_atomically(self.directory / _RECORD, json.dumps(content, indent=1, default=str))

    def finished(self, result: float | None) -> Run:
        """Returns the record of the run once it has come to its end."""
        return replace(self, is_finished=True, result=result)

    def checkpoints(self) -> list[Path]:
        """Returns the checkpoints that the run wrote, the latest one first."""
        return [path for path in _checkpoints(self.directory) if path.stat().st_mtime_ns > self.older]

    def whole_checkpoint(self) -> Path | None:
        """Returns the latest checkpoint that is whole, or that is there; None if the run has none at all."""
        found = self.checkpoints()
        for path in found:
            if (damage := find_damage(path)) is None:
                return path
            print(f"{shown(path)} is damaged ({damage}): it is passed over", file=sys.stderr)
        # Loading it says what is wrong.
        return found[0] if found else None

    def is_left_alone(self) -> bool:
        """Returns whether the run is unfinished, has a checkpoint, and nobody is working on it."""
        return not self.is_finished and bool(self.checkpoints()) and not is_held_by_another(self.directory)


def describe(config: DictConfig, job: str | None = None) -> Run:
    """Returns the record of the run that begins now, of a configuration that was not resolved."""
    directory = Path(config.run_dir).absolute()
    choices: dict[str, str] = {}
    if HydraConfig.initialized():
        choices = _own_groups(HydraConfig.get().runtime.choices)
    plain = json.loads(json.dumps(OmegaConf.to_container(config, resolve=False), default=str))
    return Run(directory, time.time(), plain, choices, job=job, older=_latest_time(directory))


def read(directory: Path) -> Run | None:
    """Returns the record of the run in a directory; None if there is none that can be read."""
    try:
        return Run(directory, **json.loads((directory / _RECORD).read_text()))
    except FileNotFoundError:
        return _read_hydras(directory)
    except (OSError, ValueError, TypeError):
        return None


def find_run(checkpoint: Path) -> Run | None:
    """Returns the run that a checkpoint lies in the directory of."""
    for directory in list(checkpoint.absolute().parents)[:3]:
        if (directory / _HYDRA).is_dir():
            return read(directory)
    return None


def has_runs(name: str) -> bool:
    """Returns whether there is a run below ``runs/NAME``."""
    return any(_walk(Path("runs") / name))


def find_others(run: Run, name: str, recorded: bool = False) -> list[Run]:
    """Returns the runs that one may go on with, the newest one first.

    They lie below ``runs/NAME``, or were in the run's own directory before, and are no jobs of the same sweep.

    Args:
        run: the one that wants to go on.
        name: of the runs.
        recorded: leaves out those of the first edition, each of which takes a while to read.
    """
    directories = {folder.resolve() for root in (Path("runs") / name, run.directory) for folder in _walk(root)}
    if not (run.directory / _RECORD).exists():
        # Hydra has written there what could be taken for a run of the first edition.
        directories.discard(run.directory.resolve())
    if recorded:
        directories = {directory for directory in directories if (directory / _RECORD).exists()}
    found = [other for directory in directories if (other := read(directory)) is not None]
    others = [other for other in found if run.job is None or other.job != run.job]
    return sorted(others, key=lambda other: other.started, reverse=True)


def find_last(run: Run, name: str, swept: Sequence[str] = ()) -> Path:
    """Returns the checkpoint that ``ckpt_path=last`` means: of the newest run of the same kind that has one.

    Args:
        run: the one that wants to go on.
        name: of the runs.
        swept: keys and groups that tell apart the jobs of the sweep that the run is one of: these must be the same too.

    Raises:
        CheckpointError: there is none; says which run comes nearest, and what differs.
    """
    root = Path("runs") / name
    candidates = find_others(run, name)
    same = [other for other in candidates if not differences(run, other, swept)]
    for other in same:
        if (path := other.whole_checkpoint()) is not None:
            return path
    *most, last = *SAME, *swept
    keys = f"{', '.join(most)} and {last}"
    if same:
        raise CheckpointError(
            f"ckpt_path=last: {shown(same[0].directory)} has the same {keys}, but no checkpoint to go on from: leave "
            "ckpt_path out to begin anew"
        )
    if not candidates:
        raise CheckpointError(f"ckpt_path=last: there is no last.ckpt below {root.absolute()}, nor another checkpoint")
    with_checkpoints = [other for other in candidates if other.checkpoints()]
    nearest = min(with_checkpoints or candidates, key=lambda other: len(differences(run, other, swept)))
    differing = [f"{key}={theirs} there and {mine} here" for key, mine, theirs in differences(run, nearest, swept)]
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise CheckpointError(
        f"ckpt_path=last: no run below {root.absolute()} has the same {keys}; the nearest is "
        f"{shown(nearest.directory)}: {'; '.join(differing[:_SHOWN])}{more}"
    )


def find_unfinished(run: Run, name: str) -> Run | None:
    """Returns the newest run of the same kind below ``runs/NAME``, if that was left unfinished."""
    same = (other for other in find_others(run, name, recorded=True) if not differences(run, other))
    newest = next((other for other in same if other.is_finished or other.checkpoints()), None)
    return newest if newest is not None and newest.is_left_alone() else None


def differences(mine: Run, theirs: Run, swept: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Returns what tells apart two runs of which one would go on with the other: key, and both values as JSON.

    These are the keys `SAME`, compared before interpolation, the choice of the group ``debug``, since a run that looks
    whether everything fits together is none to go on with, and ``swept``.
    """
    found = []
    for key in (*SAME, *swept):
        if key not in SAME and (key in mine.choices or key in theirs.choices):
            found.append((key, mine.choices.get(key), theirs.choices.get(key)))
            continue
        here, there = (_flat(_select(run.config, key), key) for run in (mine, theirs))
        for name in dict.fromkeys([*here, *there]):
            found.append((name, here.get(name), there.get(name)))
    found.append((f"+{_DEBUG}", mine.choices.get(_DEBUG), theirs.choices.get(_DEBUG)))
    return [(name, json.dumps(here), json.dumps(there)) for name, here, there in found if not _equal(here, there)]


def shown(path: Path) -> str:
    """Returns a path as a person would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _equal(one: Any, other: Any) -> bool:
    # As text too: a value that is not a number equals itself.
    return one == other or json.dumps(one) == json.dumps(other)


def _select(config: Any, key: str) -> Any:
    for part in key.partition("@")[0].lstrip("+~").split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _flat(node: Any, prefix: str) -> dict[str, Any]:
    """Returns the values of a configuration by dotted key."""
    if isinstance(node, dict) and node:
        return {name: value for key, part in node.items() for name, value in _flat(part, f"{prefix}.{key}").items()}
    return {prefix: node}


def _own_groups(choices: Any) -> dict[str, str]:
    """Returns the choices of the groups that are not Hydra's own."""
    return {str(group): choice for group, choice in choices.items() if not str(group).startswith("hydra/")}


def _walk(root: Path) -> Iterator[Path]:
    """Yields the directories of runs at and below one."""
    for folder, folders, _ in os.walk(root):
        if _HYDRA in folders:
            yield Path(folder)
        folders[:] = [name for name in folders if name[0] != "." and name not in ("checkpoints", "tensorboard")]


def _checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints in the directory of a run, the latest first; of two of one time ``last.ckpt``."""
    found = []
    for folder, folders, files in os.walk(directory):
        # Other runs may lie below.
        folders[:] = [name for name in folders if name[0] != "." and not (Path(folder) / name / _HYDRA).is_dir()]
        found += [Path(folder) / name for name in files if name.endswith(".ckpt") and name[0] != "."]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), reverse=True)


def _latest_time(directory: Path) -> int:
    return max((path.stat().st_mtime_ns for path in _checkpoints(directory)), default=0)


def _read_hydras(directory: Path) -> Run | None:
    """Returns the record of a run of the first edition."""
    try:
        path = directory / _HYDRA / "config.yaml"
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        choices = OmegaConf.load(directory / _HYDRA / "hydra.yaml").hydra.runtime.choices
        overrides = OmegaConf.to_container(OmegaConf.load(directory / _HYDRA / "overrides.yaml"), resolve=False)
        started = path.stat().st_mtime
        plain = json.loads(json.dumps(config, default=str))
    except Exception:
        # A file that is missing, empty or damaged, which YAML and OmegaConf have many words for: no run to go on with.
        return None
    if not isinstance(plain, dict) or not plain:
        return None
    return Run(directory, started, plain, _own_groups(choices), overrides, is_finished=_has_figures(directory))


def _has_figures(directory: Path) -> bool:
    """Returns whether a run without a record has come to its report, the last thing before which is its wall time."""
    try:
        return "wall_seconds" in json.loads((directory / "metrics.json").read_text())
    except (OSError, ValueError, TypeError):
        return False
