"""Begins a job, goes on with the run that it had begun, and ends it: by the record of its run, whoever starts it again.

A person starts a job again with ``ckpt_path=last``; torchrun does so by itself, see `lightkit.runtime.restart_record`.
"""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from lightkit._util.atomic_write import hold, release, remove_leftovers
from lightkit.app import run_records, sweep_record
from lightkit.app.run_records import Run, shown
from lightkit.app.sweep_record import Sweep
from lightkit.errors import ConfigError
from lightkit.runtime.environment import is_under_torchrun
from lightkit.runtime.restart_record import DIRECTORY, RestartFile, RestartRecord, is_restart_possible, restart_count


@functools.cache
def of_this_process() -> Restarts:
    """Returns the restarts of the job that this process leads; the arguments are those of the first call."""
    return Restarts()


def command_line() -> list[str] | None:
    """Returns the arguments for this process; after a restart by torchrun, with the directory of the run begun.

    Returns:
        None if nothing was left to do before the restart.

    Raises:
        LightkitError: torchrun was started so that a restart could not work.
    """
    return of_this_process().arguments() if is_under_torchrun() else sys.argv[1:]


def restarted_directory() -> str | None:
    """Returns Hydra's directory of the job that torchrun has started again; None if it has not."""
    return of_this_process().directory() if is_under_torchrun() else None


class Restarts:
    """One job through its restarts, in the process that composes its configuration.

    Raises:
        ConfigError: torchrun was started so that a restart could not work, or another job has the same id.
    """

    def __init__(self) -> None:
        self._arguments = list(sys.argv[1:])
        self._file = RestartFile(self._arguments)
        self._record = self._file.read() if is_restart_possible() else None
        # The run that is being done.
        self._run: Run | None = None

    def arguments(self) -> list[str] | None:
        """Returns the command line, with the directory of the run that goes on; None if nothing is left to do."""
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
        """Begins a run, or goes on with it: puts the checkpoint to go on from into the configuration.

        Args:
            config: of the job.
            unresolved: the same configuration before interpolation, by which runs are compared.

        Returns:
            False if the run was done before.

        Raises:
            CheckpointError: ``ckpt_path=last``, and there is no run to go on with.
            ConfigError: another process writes to the directory of the run.
        """
        directory = Path(config.run_dir).absolute()
        self._record_for_restart(directory)
        _take(directory)
        sweep = sweep_record.current()
        job = sweep.job if sweep is not None else self._record.job if self._record is not None else None
        run = run_records.describe(unresolved or config, job)
        run = replace(run, directory=directory, overrides=_overrides())
        before = run_records.read(directory)
        checkpoint = None
        if before is not None and job is not None and before.job == job:
            if before.is_finished and before.overrides == run.overrides:
                print(f"done before the restart: {directory}", flush=True)
                self._run = before
                release(directory)
                return False
            run = replace(run, older=before.older)
            checkpoint = _continue_own(run, before)
        if checkpoint is None:
            checkpoint = _find_checkpoint(run, config, sweep)
        if checkpoint is not None:
            with open_dict(config):
                config.ckpt_path = str(checkpoint)
        if before is not None and _is_within(config.get("ckpt_path"), directory):
            # The run goes on with what is there: the checkpoints are its own.
            run = replace(run, older=min(run.older, before.older))
        run.write()
        self._run = run
        return True

    def _record_for_restart(self, directory: Path) -> None:
        """Writes where the run lies, for the case that torchrun starts the job again."""
        if not is_restart_possible() or self._record is not None:
            return
        if restart_count() > 0:
            print(
                f"process 0 finds no run of this job below {DIRECTORY.parent.absolute()} and begins anew; if there "
                "was one, that directory is not on a file system that all machines share",
                file=sys.stderr,
            )
        self._record = RestartRecord(self._arguments, *_hydra_directory(str(directory)))
        self._file.write(self._record)

    def end(self, result: float | None) -> None:
        """Records that the run is done.

        Args:
            result: the figure that a sweeper gets.
        """
        self._run = self._begun().finished(result)
        self._run.write()

    def leave(self) -> None:
        """Lets others write to the directory of the run, done or not."""
        release(self._begun().directory)

    def result(self) -> float | None:
        """Returns the figure that a sweeper gets of a run that was done before."""
        return self._begun().result

    def finish(self) -> None:
        """Records that the whole job is done."""
        if self._record is not None:
            self._file.finish(self._record)

    def _begun(self) -> Run:
        assert self._run is not None, "begin comes first"
        return self._run


def _take(directory: Path) -> None:
    """Makes this process the one that writes to the directory of the run.

    Raises:
        ConfigError: another process does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # After a restart the machine that held the directory may be gone, and a file system not know it yet.
    if not hold(directory) and not is_restart_possible():
        raise ConfigError(f"another lightkit.train, which is still running, writes to {shown(directory)}")
    # Whoever was writing is gone.
    remove_leftovers(directory)


def _continue_own(run: Run, before: Run) -> Path | None:
    """Returns the checkpoint from which a job that was started again goes on with its own run; None to begin anew."""
    if before.overrides != run.overrides:
        print(f"other parameters than before the restart: beginning anew in {run.directory}", flush=True)
        for checkpoint in before.checkpoints():
            checkpoint.unlink()
    elif (checkpoint := run.whole_checkpoint()) is not None:
        print(f"continuing {checkpoint}", flush=True)
        return checkpoint
    else:
        print(f"no checkpoint yet: beginning again in {run.directory}", flush=True)
    return None


def _find_checkpoint(run: Run, config: DictConfig, sweep: Sweep | None) -> Path | None:
    """Returns the checkpoint that ``ckpt_path=last`` means; without it, says which run could be gone on with."""
    if config.get("ckpt_path") == "last":
        checkpoint = run_records.find_last(run, config.name, sweep.swept if sweep is not None else ())
        print(f"continuing {shown(checkpoint)}", flush=True)
        return checkpoint
    if run.job is None and config.get("ckpt_path") is None and "name" in config:
        if (unfinished := run_records.find_unfinished(run, config.name)) is not None:
            print(f"{shown(unfinished.directory)} is unfinished: ckpt_path=last goes on with it", flush=True)
    return None


def _is_within(checkpoint: str | None, directory: Path) -> bool:
    return checkpoint is not None and Path(checkpoint).absolute().is_relative_to(directory)


def quoted(text: str) -> str:
    """Returns a text in quotes as Hydra's command line reads it: it may contain a comma or an equals sign."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), text) + "'"


def _hydra_directory(run_dir: str) -> tuple[str, bool]:
    """Returns Hydra's directory of the run, or of the sweep that the run is one of; and True for a sweep."""
    if not HydraConfig.initialized():
        return run_dir, False
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return str(Path(hydra.sweep.dir).absolute()), True
    return hydra.runtime.output_dir, False


def _overrides() -> list[str]:
    """Returns the overrides that tell apart the runs of a job."""
    if not HydraConfig.initialized():
        return []
    return [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] != "ckpt_path"]
