"""How a job begins, goes on and ends: by the record of its run, whoever starts it again.

A person does so with ``ckpt_path=last``. torchrun starts its processes again by itself, for which there is a small file
that says where the job's run lies. It is named by torchrun's id of the job and lies below ``runs``, next to the runs
themselves: whoever can read the checkpoint can read it. The rendezvous store would not do, as it goes with the machine
that holds it; neither does the number of restarts that torchrun tells its processes, which differs from machine to
machine, and is 0 for all of them when a machine comes back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import socket
import sys
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from lightkit._util.atomic_write import hold, release, remove_leftovers, write_text_atomically
from lightkit.app import run_records, sweep_record
from lightkit.app.run_records import Run, shown
from lightkit.errors import CheckpointError, ConfigError

# What torchrun calls a job that was given no id.
_NO_ID = ("", "none")

DIRECTORY = Path("runs") / ".torchrun"


@dataclass
class Record:
    """What is known of a job of torchrun.

    Args:
        arguments: of the command line, which tell apart two jobs of the same id.
        directory: Hydra's, of the run or of the sweep.
        is_sweep: whether the job is a sweep.
        job: names the job in the records of its runs.
        is_finished: whether there is nothing more to do.
    """

    arguments: list[str]
    directory: str
    is_sweep: bool
    job: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_finished: bool = False


class Restarts:
    """The way of one job through its restarts, as the process that composes its configuration sees it.

    Raises:
        ConfigError: torchrun was started so that a restart could not work, or another job has come under the same id.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._arguments = list(sys.argv[1:])
        self._path = DIRECTORY / f"{_key()}.json"
        self._record = self._read() if is_expected() else None
        # Of the one that is being done.
        self._run: Run | None = None

    def arguments(self) -> list[str] | None:
        """The command line, with the directory of the run that goes on; None if there is nothing left to do."""
        if self._record is None:
            return self._arguments
        if self._record.is_finished:
            print(f"done before the restart: {self._record.directory}")
            return None
        key = "hydra.sweep.dir" if self._record.is_sweep else "hydra.run.dir"
        return [*self._arguments, f"{key}={quoted(self._record.directory)}"]

    def directory(self) -> str | None:
        """Returns Hydra's directory of the job that torchrun has started again; None if it has not."""
        return None if self._record is None else self._record.directory

    def begin(self, config: DictConfig, unresolved: DictConfig | None = None) -> bool:
        """Puts the checkpoint to go on from into the configuration; False if the run is done already.

        Args:
            config: of the job.
            unresolved: the same before interpolation, by which runs are compared.

        Raises:
            CheckpointError: ``ckpt_path=last``, and there is no run to go on with.
            ConfigError: another process writes to the directory of the run.
        """
        run_dir = Path(config.run_dir).absolute()
        if is_expected() and self._record is None:
            if self.count > 0:
                print(
                    f"process 0 finds no run of this job below {DIRECTORY.parent.absolute()} and begins anew; if there "
                    "was one, that directory is not on a file system that all machines share",
                    file=sys.stderr,
                )
            self._record = Record(self._arguments, *_hydra_directory(str(run_dir)))
            self._write()
        sweep = sweep_record.current()
        run_dir.mkdir(parents=True, exist_ok=True)
        # After a restart the machine that held it may be gone, and a file system not know it yet.
        if not hold(run_dir) and not is_expected():
            raise ConfigError(f"another lightkit.train, which is still running, writes to {shown(run_dir)}")
        # Whoever was writing is gone.
        remove_leftovers(run_dir)
        job = sweep.job if sweep is not None else self._record.job if self._record is not None else None
        run = replace(run_records.describe(unresolved or config, job), directory=run_dir, overrides=_overrides())
        before = run_records.read(run_dir)
        is_own = before is not None and job is not None and before.job == job
        path = None
        if is_own and before.overrides != run.overrides:
            print(f"other parameters than before the restart: beginning anew in {run_dir}", flush=True)
            for checkpoint in before.checkpoints():
                checkpoint.unlink()
            run = replace(run, older=before.older)
        elif is_own and before.is_finished:
            print(f"done before the restart: {run_dir}", flush=True)
            self._run = before
            release(run_dir)
            return False
        elif is_own:
            run = replace(run, older=before.older)
            if (path := run.whole_checkpoint()) is not None:
                print(f"continuing {path}", flush=True)
            else:
                print(f"no checkpoint yet: beginning again in {run_dir}", flush=True)
        if path is None and config.get("ckpt_path") == "last":
            path = run_records.find_last(run, config.name, sweep.swept if sweep is not None else ())
            print(f"continuing {shown(path)}", flush=True)
        elif job is None and config.get("ckpt_path") is None and "name" in config:
            if (unfinished := run_records.find_unfinished(run, config.name)) is not None:
                print(f"{shown(unfinished.directory)} is unfinished: ckpt_path=last goes on with it", flush=True)
        if path is not None:
            with open_dict(config):
                config.ckpt_path = str(path)
        if before is not None and _is_within(config.get("ckpt_path"), run_dir):
            # It goes on with what is there: the checkpoints are its own.
            run = replace(run, older=min(run.older, before.older))
        run.write()
        self._run = run
        return True

    def end(self, config: DictConfig, result: float | None) -> None:
        """Notes that a run is done."""
        self._run = self._run.finished(result)
        self._run.write()

    def leave(self) -> None:
        """Lets others write to the directory of the run, done or not."""
        release(self._run.directory)

    def result(self, config: DictConfig) -> float | None:
        """Of a run that was done before."""
        return self._run.result

    def finish(self) -> None:
        """Notes that the whole job is."""
        if self._record is None:
            return
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
            self._path.unlink(missing_ok=True)
            return
        # Not forgotten: another process may fail at its very end, and all of them be started again for that.
        self._record.is_finished = True
        self._write()

    def _read(self) -> Record | None:
        try:
            record = Record(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self._path.absolute()}, which says what this job did before a restart, is damaged: remove it to "
                "begin anew"
            ) from error
        if self.count > 0:
            if record.arguments != self._arguments:
                raise ConfigError(
                    f"another job uses --rdzv-id={os.environ.get('TORCHELASTIC_RUN_ID')} too, with the arguments "
                    f"{shlex.join(record.arguments)}: give each job an id of its own"
                )
            return record
        # All of torchrun may have been started again, by SLURM or Kubernetes, under the id of before.
        if record.arguments == self._arguments and not record.is_finished and _has_id():
            return record
        # At once: if this attempt fails before it has a run, the next one must not take that record for its own.
        self._path.unlink(missing_ok=True)
        return None

    def _write(self) -> None:
        write_text_atomically(self._path, json.dumps(asdict(self._record), indent=2))


def _is_within(checkpoint: str | None, run_dir: Path) -> bool:
    return checkpoint is not None and Path(checkpoint).absolute().is_relative_to(run_dir)


def quoted(text: str) -> str:
    """Returns a text in quotes as Hydra's command line reads it: it may have a comma or an equals sign in it."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), text) + "'"


def is_expected() -> bool:
    """Whether torchrun may start the processes of this job again.

    Raises:
        ConfigError: it may, but they could not go on.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return restarts > 0 or _has_id()
    lacks = []
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        lacks.append("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    if not _has_id():
        lacks.append("--rdzv-id=NAME")
    if restarts > 0 and lacks:
        raise ConfigError(
            f"torchrun --max-restarts={restarts}: on several machines restarts need {' and '.join(lacks)}; "
            "python -m lightkit.launch prints a command that has all it takes"
        )
    return not lacks


def _has_id() -> bool:
    return os.environ.get("TORCHELASTIC_RUN_ID", "none") not in _NO_ID


def _key() -> str:
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name in _NO_ID:
        # torchrun itself, the parent, stays over restarts.
        return f"{socket.gethostname()}-{os.getppid()}"
    safe = "".join(character if character.isalnum() or character in "-_." else "_" for character in name)
    return name if safe == name and len(name) < 80 else f"{safe[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _hydra_directory(run_dir: str) -> tuple[str, bool]:
    """Where Hydra put the run, or the sweep that it is one of."""
    if not HydraConfig.initialized():
        return run_dir, False
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return str(Path(hydra.sweep.dir).absolute()), True
    return hydra.runtime.output_dir, False


def _overrides() -> list[str]:
    """What tells apart the runs of a job."""
    if not HydraConfig.initialized():
        return []
    return [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] != "ckpt_path"]
