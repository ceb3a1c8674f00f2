"""What lets a job go on after torchrun has started its processes again: a small file that says where its run lies.

The file is named by torchrun's id of the job and lies below ``runs``, next to the runs themselves: whoever can read the
checkpoint can read it. The rendezvous store would not do, as it goes with the machine that holds it; neither does the
number of restarts that torchrun tells its processes, which differs from machine to machine, and is 0 for all of them
when a machine comes back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from lightkit.errors import CheckpointError, ConfigError
from lightkit.files import remove_leftovers, write_atomically

# What torchrun calls a job that was given no id.
_NO_ID = ("", "none")

DIRECTORY = Path("runs") / ".torchrun"


@dataclass
class Record:
    """What is known of a job.

    Args:
        arguments: of the command line, which tell apart two jobs of the same id.
        directory: Hydra's, of the run or of the sweep.
        is_sweep: whether the job is a sweep.
        begun: directories of the runs begun, each with the time of the latest checkpoint that was there before.
        overrides: the parameters of each, as Hydra took them: a sweeper may propose others when it is started again.
        done: directories of those that are done, each with the job's result.
        is_finished: whether there is nothing more to do.
    """

    arguments: list[str]
    directory: str
    is_sweep: bool
    begun: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, list[str]] = field(default_factory=dict)
    done: dict[str, float | None] = field(default_factory=dict)
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

    def arguments(self) -> list[str] | None:
        """The command line, with the directory of the run that goes on; None if there is nothing left to do."""
        if self._record is None:
            return self._arguments
        if self._record.is_finished:
            print(f"done before the restart: {self._record.directory}")
            return None
        key = "hydra.sweep.dir" if self._record.is_sweep else "hydra.run.dir"
        # Quoted as Hydra reads it: a name may have a comma or an equals sign in it.
        quoted = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), self._record.directory)
        return [*self._arguments, f"{key}='{quoted}'"]

    def begin(self, config: DictConfig) -> bool:
        """Puts the checkpoint to go on from into the configuration; False if the run is done already."""
        if not is_expected():
            return True
        run_dir = str(Path(config.run_dir).absolute())
        if self._record is None:
            if self.count > 0:
                print(
                    f"process 0 finds no run of this job below {DIRECTORY.parent.absolute()} and begins anew; if there "
                    "was one, that directory is not on a file system that all machines share",
                    file=sys.stderr,
                )
            self._record = Record(self._arguments, *_hydra_directory(run_dir))
        overrides = _overrides()
        if run_dir in self._record.begun:
            # Whoever was writing is gone.
            remove_leftovers(Path(run_dir), "*.ckpt")
            if self._record.overrides.get(run_dir) != overrides:
                print(f"other parameters than before the restart: beginning anew in {run_dir}", flush=True)
                self._forget(run_dir)
        if run_dir in self._record.done:
            print(f"done before the restart: {run_dir}")
            return False
        if run_dir not in self._record.begun:
            self._record.begun[run_dir] = _latest_time(Path(run_dir))
            self._record.overrides[run_dir] = overrides
            for path in _metrics_of_before(Path(run_dir)):
                path.unlink()
        elif (path := _own_checkpoint(Path(run_dir), self._record.begun[run_dir])) is not None:
            print(f"continuing {path}", flush=True)
            with open_dict(config):
                config.ckpt_path = str(path)
            _keep_metrics(Path(run_dir))
        else:
            print(f"no checkpoint yet: beginning again in {run_dir}", flush=True)
        self._write()
        return True

    def end(self, config: DictConfig, result: float | None) -> None:
        """Notes that a run is done."""
        if self._record is not None:
            self._record.done[str(Path(config.run_dir).absolute())] = result
            self._write()

    def result(self, config: DictConfig) -> float | None:
        """Of a run that was done before."""
        return self._record.done.get(str(Path(config.run_dir).absolute()))

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

    def _forget(self, run_dir: str) -> None:
        """Lets a run be one that was not begun, without the checkpoints that it wrote."""
        before = self._record.begun.pop(run_dir)
        self._record.done.pop(run_dir, None)
        for path in Path(run_dir).rglob("*.ckpt"):
            if path.stat().st_mtime_ns > before:
                path.unlink()

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
        content = json.dumps(asdict(self._record), indent=2)
        write_atomically(self._path, lambda file: file.write(content.encode()))


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
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _checkpoints(run_dir: Path) -> list[Path]:
    return list(run_dir.rglob("last.ckpt")) or list(run_dir.rglob("*.ckpt"))


def _latest_time(run_dir: Path) -> int:
    return max((path.stat().st_mtime_ns for path in _checkpoints(run_dir)), default=0)


def _own_checkpoint(run_dir: Path, before: int) -> Path | None:
    """The latest checkpoint, if the run wrote it: those of an earlier one may lie in the same directory."""
    path = max(_checkpoints(run_dir), key=lambda path: path.stat().st_mtime_ns, default=None)
    return path if path is not None and path.stat().st_mtime_ns > before else None


def _keep_metrics(run_dir: Path) -> None:
    """Lightning's logger begins a new ``metrics.csv``: the one of before the restart stays under another name."""
    if (path := run_dir / "metrics.csv").exists():
        path.rename(run_dir / f"metrics.before_restart_{1 + len(_metrics_of_before(run_dir)):03}.csv")


def _metrics_of_before(run_dir: Path) -> list[Path]:
    return list(run_dir.glob("metrics.before_restart_*.csv"))
