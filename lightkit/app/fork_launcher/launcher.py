"""The launcher as Hydra sees it: it composes the jobs, lets them run, and returns what came of each."""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
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

# Seconds that jobs have for putting things in order: a little longer than each gives the processes that it started.
_PATIENCE = {signal.SIGINT: 9.0, signal.SIGTERM: 26.0}

# Seconds between two looks at the jobs, should a signal be missed.
_LOOK = 1.0


class ForkLauncher(Launcher):
    """Runs each job of a sweep in a process that forks from this one, which has imported everything.

    A job that is killed or crashes counts as one that failed by a fault of the program: the others run, and the error
    comes after the last of them. An error in the input ends the sweep, once the jobs that run have come to their end.

    Args:
        jobs: how many run at the same time, each with its share of the cores.
    """

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what Hydra has for a launcher.

        Raises:
            ConfigError: ``jobs`` is no number of jobs, or this process cannot fork.
        """
        if type(self._jobs) is not int or self._jobs < 1:
            raise ConfigError(f"hydra.launcher.jobs must be a whole number of at least 1, got {self._jobs!r}")
        check_platform()
        self._context = hydra_context
        self._function = task_function
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs jobs, and returns what Hydra knows of each, in their order.

        Raises:
            ConfigError: this process cannot fork; no job has started.
            CarriedError: an error in the input of a job.
            JobError: a fault of Hydra's, before or after the job itself.
            KeyboardInterrupt: Ctrl-C, which was passed on to the jobs that were running.
            Terminated: SIGTERM, likewise.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        preload(self._config)
        at_once = f", {self._jobs} at the same time" if self._jobs > 1 else ""
        log.info(f"Launching {len(job_overrides)} jobs, forked from this process{at_once}")
        with _hold_signals() as (held, mask):
            return self._launch(list(enumerate(job_overrides, initial_job_idx)), held, mask)

    def _launch(
        self, waiting: list[tuple[int, Sequence[str]]], held: set[signal.Signals], mask: set[signal.Signals]
    ) -> list[JobReturn]:
        """Runs the jobs while the signals ``held`` are blocked, which it waits for."""
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
                if running and (received := _wait(held)) is not None:
                    _end_in_order(list(running.values()), received, held)
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

    def _start(self, number: int, overrides: Sequence[str], mask: set[signal.Signals]) -> JobProcess:
        """Composes the configuration of a job, and lets it run."""
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
        # A full collection would write to every object that there is, and so copy what the processes share: after one,
        # a job of +debug=quick had 162 MiB of its own, and has 77 so.
        gc.freeze()
        threads = max(1, len(os.sched_getaffinity(0)) // self._jobs) if self._jobs > 1 else None
        return JobProcess(f"job {number}", filter_overrides(overrides), run, mask, threads)


@contextmanager
def _hold_signals() -> Iterator[tuple[set[signal.Signals], set[signal.Signals]]]:
    """Blocks the signals that say that a job has ended, or should; yields these, and those blocked before.

    Nothing is interrupted between the start of a process and the note of it. What a shell has this process ignore
    stays ignored.
    """
    ends = (signal.SIGINT, signal.SIGTERM)
    held = {signal.SIGCHLD, *(number for number in ends if signal.getsignal(number) != signal.SIG_IGN)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield held, mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(held: set[signal.Signals]) -> signal.Signals | None:
    """Waits until a job may have ended; returns the signal that asks for the end of all, if one has come."""
    received = signal.sigtimedwait(held, _LOOK)
    return None if received is None or received.si_signo == signal.SIGCHLD else signal.Signals(received.si_signo)


def _end_in_order(jobs: list[JobProcess], received: signal.Signals, held: set[signal.Signals]) -> NoReturn:
    """Passes a signal on, waits until the jobs have put things in order, and ends the sweep as the signal would."""
    for job in jobs:
        job.send(received)
    end = time.monotonic() + _PATIENCE[received]
    while not all(job.has_ended() for job in jobs) and time.monotonic() < end:
        _wait(held)
    # Some send it twice; the second one must not end this process in the middle.
    while signal.sigtimedwait(held, 0) is not None:
        pass
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated
