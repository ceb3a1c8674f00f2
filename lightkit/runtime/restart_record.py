"""The file in which a job under torchrun records the directory of its run, for the job after a restart.

torchrun starts the processes of a job again by itself. The file has torchrun's id of the job as its name, and lies
below ``runs``, next to the runs: a process that can read the checkpoint can read the file. The rendezvous store cannot
hold the record, since the store is lost with its machine. The number of restarts that torchrun tells its processes
cannot replace the record either: it differs between machines, and is 0 on all of them after a machine has come back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import socket
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightkit._util.atomic_write import write_text_atomically
from lightkit.errors import CheckpointError, ConfigError

# The ids that torchrun gives to a job without ``--rdzv-id``.
_NO_ID = ("", "none")

DIRECTORY = Path("runs") / ".torchrun"

# The number of characters of an id that a file name contains.
_LONGEST_ID = 80


@dataclass
class RestartRecord:
    """The record of a job of torchrun.

    Args:
        arguments: the arguments of the command line, which tell apart two jobs with the same id of torchrun.
        directory: the directory of the run, or of the sweep.
        is_sweep: True if the job is a sweep.
        job: a unique name of the job, which the record of each of its runs repeats: see `lightkit.app.run_records`.
        is_finished: True if the whole job is done.
    """

    arguments: list[str]
    directory: str
    is_sweep: bool
    job: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_finished: bool = False


class RestartFile:
    """The file of the `RestartRecord` of this process's job.

    Args:
        arguments: the arguments of the command line of this process.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._path = DIRECTORY / f"{_job_key()}.json"

    def read(self) -> RestartRecord | None:
        """Returns the record of this job; removes the record of another job that has used the same file before.

        Returns:
            The record; None if this job has none, as at its first start.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: after a restart, the record is that of another job with the same id.
        """
        try:
            record = RestartRecord(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self._path.absolute()}, which says what this job did before a restart, is damaged: remove it to "
                "begin anew"
            ) from error
        if restart_count() > 0:
            if record.arguments != self._arguments:
                raise ConfigError(
                    f"another job uses --rdzv-id={os.environ.get('TORCHELASTIC_RUN_ID')} too, with the arguments "
                    f"{shlex.join(record.arguments)}: give each job an id of its own"
                )
            return record
        # SLURM or Kubernetes may have started torchrun itself again, under the id that it had before.
        if record.arguments == self._arguments and not record.is_finished and _has_id():
            return record
        # The record must go now: if this attempt fails before it has a run, the next one would take it for its own.
        self.remove()
        return None

    def write(self, record: RestartRecord) -> None:
        """Replaces the content of the file by ``record``."""
        write_text_atomically(self._path, json.dumps(asdict(record), indent=2))

    def finish(self, record: RestartRecord) -> None:
        """Records that the whole job is done; removes the file instead if torchrun never restarts.

        Args:
            record: the record of this job; the method sets its ``is_finished``.
        """
        if max_restarts() == 0:
            self.remove()
            return
        # The file stays: another process may fail at its very end, and torchrun then starts all of them again.
        record.is_finished = True
        self.write(record)

    def remove(self) -> None:
        """Removes the file, if it is there."""
        self._path.unlink(missing_ok=True)


def restart_count() -> int:
    """Returns the number of times that torchrun has restarted the processes of this machine; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def max_restarts() -> int:
    """Returns the largest number of restarts by torchrun, its ``--max-restarts``; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def is_restart_possible() -> bool:
    """Returns True if torchrun, or whoever starts torchrun, may start the processes of this job again.

    Raises:
        ConfigError: torchrun may start the processes again, and they could not continue the job, since an option or a
            variable of the environment is missing; the message names it.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return max_restarts() > 0 or _has_id()
    lacks = []
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        lacks.append("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    if not _has_id():
        lacks.append("--rdzv-id=NAME")
    if max_restarts() > 0 and lacks:
        raise ConfigError(
            f"torchrun --max-restarts={max_restarts()}: on several machines restarts need {' and '.join(lacks)}; "
            "python -m lightkit.launch prints a command that has all it takes"
        )
    return not lacks


def _has_id() -> bool:
    return os.environ.get("TORCHELASTIC_RUN_ID", "none") not in _NO_ID


def _job_key() -> str:
    """Returns a file name for the job: its id, made safe, or the machine and the process of torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name in _NO_ID:
        # The parent of this process is torchrun, which keeps its process id over restarts.
        return f"{socket.gethostname()}-{os.getppid()}"
    safe = "".join(character if character.isalnum() or character in "-_." else "_" for character in name)
    if safe == name and len(name) < _LONGEST_ID:
        return name
    return f"{safe[:_LONGEST_ID]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
