"""Hydra's launcher interface: `ForkLauncher` composes the jobs, runs them and returns their results."""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lightkit.app.fork_launcher.job_process import JobError, JobProcess
from lightkit.app.fork_launcher.preload import check_platform, check_threads, preload
from lightkit.errors import CarriedError, ConfigError, Terminated

log = logging.getLogger(__name__)

# Seconds that jobs have to end after a signal: a little more than each job gives to the processes that it started.
_GRACE_PERIODS = {signal.SIGINT: 9.0, signal.SIGTERM: 26.0}

# Seconds between two polls of the jobs, in case a SIGCHLD is lost.
_POLL_INTERVAL = 1.0


class ForkLauncher(Launcher):
    """A launcher that forks each job of a sweep from this process, which has done all imports.

    A job that is killed or crashes has failed by a fault of the program: the other jobs run, and Hydra raises the error
    after the last of them. An error in the input ends the sweep after the running jobs.

    Args:
        jobs: the number of jobs that run at the same time, each with an equal share of the cores.
    """

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Receives the context, the function of a job and the configuration of the sweep from Hydra.

        Raises:
            ConfigError: ``jobs`` is not a positive int, or this process cannot fork.
        """
        if type(self._jobs) is not int or self._jobs < 1:
            raise ConfigError(f"hydra.launcher.jobs must be a whole number of at least 1, got {self._jobs!r}")
        check_platform()
        self._context = hydra_context
        self._function = task_function
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs jobs and returns Hydra's records of them, in the order of the jobs.

        Args:
            job_overrides: for each job its own overrides.
            initial_job_idx: the number of the first job in the sweep.

        Raises:
            ConfigError: this process cannot fork; no job has started.
            CarriedError: the input of a job has an error.
            JobError: Hydra failed before or after the function of a job.
            KeyboardInterrupt: Ctrl-C, after the running jobs received it and ended.
            Terminated: SIGTERM, after the running jobs received it and ended.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        preload(self._config)
        at_once = f", {self._jobs} at the same time" if self._jobs > 1 else ""
        log.info(f"Launching {len(job_overrides)} jobs, forked from this process{at_once}")
        with _block_signals() as (blocked, mask):
            return self._launch(list(enumerate(job_overrides, initial_job_idx)), blocked, mask)

    def _launch(
        self, waiting: list[tuple[int, Sequence[str]]], blocked: Collection[int], mask: Collection[int]
    ) -> list[JobReturn]:
        """Runs the jobs, at most ``jobs`` at a time, and returns Hydra's records of them in the order of the jobs.

        Args:
            waiting: for each job its number and its overrides.
            blocked: the numbers of the signals that this process has blocked, and for which it waits.
            mask: the numbers of the signals that the jobs block.
        """
        running: dict[int, JobProcess] = {}
        returns: dict[int, JobReturn] = {}
        error: BaseException | None = None
        try:
            while running or (waiting and error is None):
                try:
                    while waiting and error is None and len(running) < self._jobs:
                        number, overrides = waiting.pop(0)
                        running[number] = self._start(number, overrides, mask)
                except Exception as raised:
                    error = raised
                if running and (received := _wait_for_signal(blocked)) is not None:
                    _shut_down(list(running.values()), received, blocked)
                for number in [number for number, job in running.items() if job.has_ended()]:
                    try:
                        returns[number] = running.pop(number).result()
                    except (CarriedError, JobError, SystemExit) as raised:
                        error = error or raised
        finally:
            for job in running.values():
                job.kill()
            gc.unfreeze()
        if error is not None:
            raise error
        return [returns[number] for number in sorted(returns)]

    def _start(self, number: int, overrides: Sequence[str], mask: Collection[int]) -> JobProcess:
        """Composes the configuration of a job and starts the job's process.

        Args:
            number: the number of the job in the sweep.
            overrides: the job's own overrides.
            mask: the numbers of the signals that the job blocks.
        """
        log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
        run = partial(
            run_job,
            hydra_context=self._context,
            task_function=self._function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        check_threads()
        # A full collection in a job writes to every object and so copies the pages that the processes share. Without
        # gc.freeze a job of +debug=quick had 162 MiB of memory of its own after a collection, with it 77 MiB.
        gc.freeze()
        threads = max(1, len(os.sched_getaffinity(0)) // self._jobs) if self._jobs > 1 else None
        return JobProcess(f"job {number}", filter_overrides(overrides), run, mask, threads)


@contextmanager
def _block_signals() -> Iterator[tuple[Collection[int], Collection[int]]]:
    """Blocks SIGCHLD, SIGINT and SIGTERM in this process within the context.

    No signal then interrupts this process between the start of a job and its entry in the list of jobs. A signal that
    this process ignores stays ignored.

    Yields:
        The numbers of the blocked signals, and those of the signals that were blocked before.
    """
    ends = (signal.SIGINT, signal.SIGTERM)
    blocked = {signal.SIGCHLD, *(number for number in ends if signal.getsignal(number) != signal.SIG_IGN)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield blocked, mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait_for_signal(blocked: Collection[int]) -> signal.Signals | None:
    """Waits for one of the signals ``blocked``, for `_POLL_INTERVAL` seconds at most.

    Returns:
        SIGINT or SIGTERM; None after SIGCHLD, or if no signal came.
    """
    received = signal.sigtimedwait(blocked, _POLL_INTERVAL)
    return None if received is None or received.si_signo == signal.SIGCHLD else signal.Signals(received.si_signo)


def _shut_down(jobs: list[JobProcess], received: signal.Signals, blocked: Collection[int]) -> NoReturn:
    """Forwards a signal to the jobs, waits for their ends within the grace period, and raises the signal's exception.

    Args:
        jobs: the running jobs.
        received: the signal.
        blocked: the numbers of the signals that this process has blocked.

    Raises:
        KeyboardInterrupt: ``received`` is SIGINT.
        Terminated: ``received`` is SIGTERM.
    """
    for job in jobs:
        job.send(received)
    end = time.monotonic() + _GRACE_PERIODS[received]
    while not all(job.has_ended() for job in jobs) and time.monotonic() < end:
        _wait_for_signal(blocked)
    # A second signal must not interrupt this process when the mask is restored.
    while signal.sigtimedwait(blocked, 0) is not None:
        pass
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated
