"""The start and the end of a job's run, and its resumption after a restart, by the record of the run.

A user restarts a job with ``ckpt_path=last``; torchrun restarts a job by itself, see `lightkit.runtime.restart_record`.
"""

from __future__ import annotations

import functools
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from lightkit._util.atomic_write import remove_leftovers
from lightkit._util.directory_lock import hold, release
from lightkit.app import run_records, run_search, sweep_record
from lightkit.app.log_filters import import_lightning_silently
from lightkit.app.run_directories import check_free, is_within
from lightkit.app.run_records import Run, display_path
from lightkit.app.run_search import have_same_overrides
from lightkit.app.sweep_record import Sweep
from lightkit.app.texts import quote_word
from lightkit.errors import ConfigError
from lightkit.runtime.environment import is_under_torchrun
from lightkit.runtime.restart_record import DIRECTORY, RestartFile, RestartRecord, is_restart_possible, restart_count

# The largest number of characters of an error in the record of a run.
_LONGEST_ERROR = 2000


@functools.cache
def of_this_process() -> Restarts:
    """Returns the `Restarts` of the job that this process leads; reads ``sys.argv`` at the first call."""
    return Restarts()


def command_line() -> list[str] | None:
    """Returns the command-line arguments; after a restart by torchrun it adds the directory of the job's run.

    Returns:
        The arguments; None if the job was finished before the restart.

    Raises:
        LightkitError: torchrun's settings do not allow a restart, or another job has the same id.
    """
    return of_this_process().arguments() if is_under_torchrun() else sys.argv[1:]


def restarted_directory() -> str | None:
    """Returns Hydra's output directory of a job that torchrun has restarted; None without a restart."""
    return of_this_process().directory() if is_under_torchrun() else None


class Restarts:
    """The runs of one job and their records, across restarts, in the process that composes the configuration.

    Raises:
        ConfigError: torchrun's settings do not allow a restart, or another job has the same id.
    """

    def __init__(self) -> None:
        self._arguments = list(sys.argv[1:])
        self._file = RestartFile(self._arguments)
        self._record = self._file.read() if is_restart_possible() else None
        self._run: Run | None = None

    def arguments(self) -> list[str] | None:
        """Returns the command-line arguments with the directory of a resumed run; None if the job is finished."""
        if self._record is None:
            return self._arguments
        if self._record.is_finished:
            print(f"done before the restart: {self._record.directory}")
            return None
        key = "hydra.sweep.dir" if self._record.is_sweep else "hydra.run.dir"
        return [*self._arguments, quote_word(f"{key}={self._record.directory}")]

    def directory(self) -> str | None:
        """Returns Hydra's output directory of a job that torchrun has restarted; None without a restart."""
        return None if self._record is None else self._record.directory

    def begin(self, config: DictConfig, unresolved: DictConfig | None = None, job: str | None = None) -> bool:
        """Begins or resumes a run: sets ``config.ckpt_path`` to the checkpoint, locks the directory, writes the record.

        Args:
            config: the configuration of the job.
            unresolved: the same configuration before interpolation, by which the search compares runs; None takes
                ``config``.
            job: the id of the cross-validation that the run belongs to; None for a run of its own.

        Returns:
            True if the job must run; False if the run was finished before a restart.

        Raises:
            CheckpointError: ``ckpt_path=last``, and no run can be resumed.
            ConfigError: another process writes to the directory of the run, or it holds another run.
        """
        directory = Path(config.run_dir).absolute()
        self._record_for_restart(directory)
        _lock_directory(directory)
        sweep = sweep_record.current()
        if sweep is not None:
            job = sweep.job
        elif job is None and self._record is not None:
            job = self._record.job
        run = run_records.describe(unresolved or config, job)
        run = replace(run, directory=directory, overrides=overrides_of_run())
        before = run_records.read(directory)
        checkpoint = None
        if before is not None and job is not None and before.job == job:
            if before.is_finished and have_same_overrides(before, run):
                print(f"done before the restart: {directory}", flush=True)
                self._run = before
                release(directory)
                return False
            run = replace(run, older=before.older)
            checkpoint = _find_own_checkpoint(run, before)
        if checkpoint is None:
            checkpoint = _find_checkpoint(run, config, sweep)
        if checkpoint is not None:
            with open_dict(config):
                config.ckpt_path = str(checkpoint)
        resumed = config.get("ckpt_path")
        if before is None or job is None or before.job != job:
            check_free("run_dir", directory, resumed)
        if resumed is not None and "optim" in config:
            _take_settings(config, unresolved or config)
            run = replace(run, config=run_records.describe(unresolved or config).config)
        if before is not None and is_within(resumed, directory):
            # The run resumes from a checkpoint in its own directory, so that the checkpoints there are its own.
            run = replace(run, older=min(run.older, before.older))
        run.write()
        self._run = run
        return True

    def _record_for_restart(self, directory: Path) -> None:
        """Writes the directory of the run to the restart file, which the job reads after a restart by torchrun."""
        if not is_restart_possible() or self._record is not None:
            return
        if restart_count() > 0:
            print(
                f"process 0 finds no run of this job below {DIRECTORY.parent.absolute()} and begins anew; if the job "
                "had a run, that directory is not on a file system that all machines share",
                file=sys.stderr,
            )
        self._record = RestartRecord(self._arguments, *_hydra_directory(str(directory)))
        self._file.write(self._record)

    def end(self, result: float | None) -> None:
        """Records that the run is finished.

        Args:
            result: the objective that a sweeper gets: the value of the metric that the key ``objective`` names; None
                without one.
        """
        self._run = self._current_run().finished(result)
        self._run.write()
        _update_sweep_page()

    def fail(self, error: Exception) -> None:
        """Records the error that ended the run; a full disk does not replace it by another one."""
        with suppress(OSError):
            self._run = replace(self._current_run(), error=f"{type(error).__name__}: {error}"[:_LONGEST_ERROR])
            self._run.write()
        _update_sweep_page()

    def leave(self) -> None:
        """Releases the lock of the run's directory."""
        release(self._current_run().directory)

    def result(self) -> float | None:
        """Returns the objective of the run, if it was finished before a restart; None if its record has none."""
        return self._current_run().result

    def finish(self) -> None:
        """Records that the whole job is finished."""
        if self._record is not None:
            self._file.finish(self._record)

    def _current_run(self) -> Run:
        assert self._run is not None, "call begin first"
        return self._run


def _update_sweep_page() -> None:
    """Writes the page of the sweep that this job belongs to; does nothing outside of a sweep."""
    if (sweep := sweep_record.current()) is not None:
        from lightkit.app.runs.sweep_page import update_sweep_page

        update_sweep_page(sweep.directory)


def _lock_directory(directory: Path) -> None:
    """Locks the directory of the run for this process, and removes unfinished files of earlier processes.

    Raises:
        ConfigError: another process holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # After a restart the file system may still hold the lock of a machine that is gone.
    if not hold(directory) and not is_restart_possible():
        raise ConfigError(f"another lightkit.train, which is still running, writes to {display_path(directory)}")
    remove_leftovers(directory)


def _find_own_checkpoint(run: Run, before: Run) -> Path | None:
    """Returns the checkpoint of the job's own run before the restart; None if the run must begin anew.

    Args:
        run: the run that begins now.
        before: the record of the run in the same directory before the restart.
    """
    if not have_same_overrides(before, run):
        print(f"other parameters than before the restart: beginning anew in {run.directory}", flush=True)
        for checkpoint in before.checkpoints():
            checkpoint.unlink()
    elif (checkpoint := run.latest_intact_checkpoint()) is not None:
        print(f"continuing {checkpoint}", flush=True)
        return checkpoint
    else:
        print(f"no checkpoint yet: beginning again in {run.directory}", flush=True)
    return None


def _find_checkpoint(run: Run, config: DictConfig, sweep: Sweep | None) -> Path | None:
    """Returns the checkpoint that ``ckpt_path=last`` means.

    Args:
        run: the run that begins now.
        config: the configuration of the job.
        sweep: the sweep that the job belongs to; None for a single job.

    Returns:
        The path of the checkpoint; None for another ``ckpt_path``. Without ``ckpt_path`` the function also prints the
        directory of a run that could be resumed.
    """
    if config.get("ckpt_path") == "last":
        checkpoint = run_search.find_last(run, config.name, sweep.swept if sweep is not None else ())
        print(f"continuing {display_path(checkpoint)}", flush=True)
        return checkpoint
    if run.job is None and config.get("ckpt_path") is None and "name" in config:
        if (unfinished := run_search.find_unfinished(run, config.name)) is not None:
            print(f"{display_path(unfinished.directory)} is unfinished: ckpt_path=last goes on with it", flush=True)
    return None


def _take_settings(config: DictConfig, unresolved: DictConfig) -> None:
    """Sets the settings that the command line does not give to those of the checkpoint that the run resumes from.

    Hydra's record of the composed configuration gets the settings too.
    """
    import_lightning_silently()
    from lightkit.app.resumed_config import take_settings

    configs = [unresolved] if config is unresolved else [unresolved, config]
    # A program that calls the job itself gives the whole configuration.
    if not HydraConfig.initialized():
        return
    if take_settings(configs, config.ckpt_path, overrides_of_run()):
        run_records.rewrite_hydra_config(unresolved)


def _hydra_directory(run_dir: str) -> tuple[str, bool]:
    """Returns Hydra's output directory of this process's job.

    Args:
        run_dir: the directory of the run, for a job without Hydra.

    Returns:
        The directory of the run, or of the sweep that the run belongs to; and True for a sweep.
    """
    if not HydraConfig.initialized():
        return run_dir, False
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return str(Path(hydra.sweep.dir).absolute()), True
    return hydra.runtime.output_dir, False


def overrides_of_run() -> list[str]:
    """Returns the overrides of this run without ``ckpt_path``."""
    if not HydraConfig.initialized():
        return []
    return [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] != "ckpt_path"]
