"""What a sweep records of itself in its directory, and the search for the sweep that ``ckpt_path=last`` means.

The record is ``sweep.json``, beside Hydra's ``multirun.yaml``. Whether a job of the sweep is done, and with which
figure, is in that job's own record: see `lightkit.app.run_records`.
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

from lightkit._util.atomic_write import is_held_by_another, write_text_atomically

_RECORD = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """A sweep, as its record has it.

    Args:
        directory: of the sweep.
        overrides: the words of its command line, without ``ckpt_path`` and the places that it writes to.
        swept: keys and groups that tell apart its jobs.
        ckpt_path: what the jobs go on from that have not begun.
        job: names the sweep in the records of its jobs.
        started: when it was begun; seconds of the epoch.
        seed: of the order of ``shuffle(...)``, of Optuna's grid, and of its samplers that were given none.
        is_finished: whether all jobs are done.
    """

    directory: Path
    overrides: list[str]
    swept: list[str]
    ckpt_path: str | None
    job: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.time)
    seed: int = field(default_factory=lambda: random.SystemRandom().randrange(2**31))
    is_finished: bool = False

    def write(self) -> None:
        """Writes the record."""
        content = {key: value for key, value in asdict(self).items() if key != "directory"}
        write_text_atomically(self.directory / _RECORD, json.dumps(content, indent=1))


def read(directory: Path) -> Sweep | None:
    """Returns the record of the sweep in a directory; None if there is none that can be read."""
    try:
        return Sweep(directory, **json.loads((directory / _RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def current() -> Sweep | None:
    """Returns the sweep that the job of this process is one of, if it is."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return read(Path(HydraConfig.get().sweep.dir).absolute())


def find_all(new: Sweep, name: str) -> list[Sweep]:
    """Returns the sweeps below ``runs/NAME`` and in the directory of the new one, the newest first."""
    paths = {path.parent.resolve() for root in (Path("runs") / name, new.directory) for path in root.rglob(_RECORD)}
    found = [sweep for path in paths if (sweep := read(path)) is not None]
    return sorted(found, key=lambda sweep: sweep.started, reverse=True)


def find(new: Sweep, name: str, finished: bool) -> Sweep | None:
    """Returns the newest sweep with the same overrides that is finished or running, or else left unfinished."""
    same = (old for old in find_all(new, name) if old.overrides == new.overrides)
    return next((old for old in same if (old.is_finished or is_held_by_another(old.directory)) == finished), None)
