"""Records of sweeps, and the search for the sweep that ``ckpt_path=last`` means.

A sweep writes its record to ``sweep.json``, beside Hydra's ``multirun.yaml``. The records of its jobs, in
`lightkit.app.run_records`, say which jobs are finished and have their objectives.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from lightkit._util import strict_json
from lightkit._util.atomic_write import write_text_atomically
from lightkit._util.directory_lock import is_held_by_another

_RECORD_FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """The record of a sweep.

    Args:
        directory: the directory of the sweep.
        overrides: the overrides on its command line, without ``ckpt_path`` and the directories.
        swept: the keys and groups that differ between its jobs.
        ckpt_path: the value of ``ckpt_path`` for jobs that have not begun; None for new trainings.
        job: the id of the sweep in the records of its jobs.
        started: the time of the start, in seconds since the epoch.
        seed: the seed of ``shuffle(...)``, of Optuna's grid, and of Optuna's samplers without a seed of their own.
        is_finished: True if all jobs are finished.
        objective: the name of the metric by which the sweep compares its jobs; None if it is not known.
        direction: ``minimize`` or ``maximize``; None if the sweeper has no direction.
    """

    directory: Path
    overrides: list[str]
    swept: list[str]
    ckpt_path: str | None
    job: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.time)
    seed: int = field(default_factory=lambda: random.SystemRandom().randrange(2**31))
    is_finished: bool = False
    objective: str | None = None
    direction: str | None = None

    def write(self) -> None:
        """Writes the record to ``sweep.json`` in the directory of the sweep."""
        content = {key: value for key, value in asdict(self).items() if key != "directory"}
        write_text_atomically(self.directory / _RECORD_FILE, strict_json.dumps(content, indent=1))


def read(directory: Path) -> Sweep | None:
    """Returns the record of the sweep in a directory; None if the record is missing or unreadable."""
    try:
        return Sweep(directory, **json.loads((directory / _RECORD_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def current() -> Sweep | None:
    """Returns the sweep that the job of this process belongs to; None outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return read(Path(HydraConfig.get().sweep.dir).absolute())


def find_all(new: Sweep, name: str) -> list[Sweep]:
    """Returns the records of the sweeps below ``runs/<name>`` and in the directory of ``new``, the newest first."""
    roots = (Path("runs") / name, new.directory)
    directories = {path.parent.resolve() for root in roots for path in root.rglob(_RECORD_FILE)}
    sweeps = [sweep for directory in directories if (sweep := read(directory)) is not None]
    return sorted(sweeps, key=lambda sweep: sweep.started, reverse=True)


def find(new: Sweep, name: str, finished: bool) -> Sweep | None:
    """Returns the newest sweep with the overrides of ``new``.

    Args:
        new: the sweep that begins now.
        name: the name of the job.
        finished: True for a sweep that is finished or running, False for one that can be resumed.

    Returns:
        The sweep; None if no sweep matches.
    """
    same = (old for old in find_all(new, name) if old.overrides == new.overrides)
    return next((old for old in same if (old.is_finished or is_held_by_another(old.directory)) == finished), None)
