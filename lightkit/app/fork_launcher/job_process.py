"""One job of a sweep in a forked process: its start, its signals and its result."""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import signal
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, BinaryIO

import torch
from hydra.core.utils import JobReturn, JobStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightkit.app.messages import explain, user_error_types
from lightkit.errors import CarriedError, LightkitError, Terminated
from lightkit.runtime.worker import end_by_signal, leave_process_group

# From Linux's prctl.h.
_PR_SET_PDEATHSIG = 1


class JobError(RuntimeError):
    """A fault of the program in a job; ``__cause__`` shows the traceback of the job's process."""


class _JobTraceback(Exception):
    """The traceback of an error in another process, as the message of an exception."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Outcome:
    """The outcome of a job, which the job's process sends to its parent.

    Args:
        job_return: Hydra's record of a job that returned, or that failed by a fault of the program; None if the job
            ended in another way.
        input_error: the message of an error in the input; None without such an error.
        program_error: the type and the message of a fault of the program; None without a fault.
        status: the argument of a `SystemExit`; None without a `SystemExit`.
        trace: the traceback of the error; empty without an error.
    """

    job_return: JobReturn | None = None
    input_error: str | None = None
    program_error: str | None = None
    status: Any = None
    trace: str = ""


class JobProcess:
    """A job that runs in a forked process.

    The process has a session of its own, so that Ctrl-C at the terminal reaches the parent alone, which forwards it
    once. The process ends when the parent ends. Its standard input is empty. Before Python 3.13 the process does not
    call the functions registered by `atexit`.

    Args:
        name: the name of the job in messages.
        overrides: the job's own overrides on the command line.
        run: the function that runs the job and returns Hydra's record of it.
        mask: the numbers of the signals that the process blocks; the parent has blocked further signals.
        threads: the largest number of threads for torch; None keeps torch's choice.
    """

    def __init__(
        self,
        name: str,
        overrides: Sequence[str],
        run: Callable[[], JobReturn],
        mask: Collection[int],
        threads: int | None,
    ) -> None:
        self._name = name
        self._overrides = list(overrides)
        # A pipe has a small buffer, so that the parent would have to read while the job runs; a file does not.
        self._outcome = tempfile.TemporaryFile()
        # Python reseeds its random module in a forked process.
        state = random.getstate()
        arguments = (run, self._outcome, os.getpid(), state, mask, threads)
        self._process = get_context("fork").Process(target=_run, args=arguments, name=name)
        self._process.start()

    def has_ended(self) -> bool:
        """Returns True if the process has ended; does not wait."""
        return self._process.exitcode is not None

    def send(self, number: signal.Signals) -> None:
        """Sends the signal ``number`` to the process, unless the process has ended."""
        pid = self._process.pid
        if pid is not None and not self.has_ended():
            os.kill(pid, number)

    def kill(self) -> None:
        """Kills the process and releases its resources."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._outcome.close()

    def result(self) -> JobReturn:
        """Returns Hydra's record of the job after the end of its process.

        If the process was killed or crashed, the job has failed.

        Raises:
            CarriedError: the input has an error, which ends the sweep.
            JobError: the program has a fault outside of the job's own function.
            SystemExit: the job called `sys.exit`.
        """
        status = self._process.exitcode
        assert status is not None, "the process has not ended"
        self._process.close()
        with self._outcome as file:
            file.seek(0)
            content = file.read()
        if status != 0 or not content:
            job_return = JobReturn(self._overrides, status=JobStatus.FAILED)
            job_return.return_value = LightkitError(self._describe_exit(status))
            return job_return
        outcome: _Outcome = pickle.loads(content)
        if outcome.input_error is not None:
            raise _with_cause(CarriedError(LightkitError(outcome.input_error)), outcome.trace)
        if outcome.program_error is not None:
            error = _with_cause(JobError(f"{self._name}: {outcome.program_error}"), outcome.trace)
            if outcome.job_return is None:
                raise error
            outcome.job_return.return_value = error
        elif outcome.job_return is None:
            raise SystemExit(outcome.status)
        return outcome.job_return

    def _describe_exit(self, status: int) -> str:
        if status >= 0:
            return f"{self._name} ended with status {status} and no result"
        hint = "; the machine may be out of memory" if status == -signal.SIGKILL else ""
        return (
            f"{self._name} was ended by {signal.Signals(-status).name}{hint}. "
            "ckpt_path=last goes on with the sweep from the last checkpoint"
        )


def _with_cause(error: BaseException, trace: str) -> BaseException:
    error.__cause__ = _JobTraceback(trace)
    return error


def _run(
    run: Callable[[], JobReturn],
    file: BinaryIO,
    parent: int,
    state: tuple[Any, ...],
    mask: Collection[int],
    threads: int | None,
) -> None:
    """Runs the job in the forked process, and writes the `_Outcome` to a file.

    Args:
        run: the function that runs the job.
        file: the file from which the parent reads the outcome.
        parent: the process id of the parent, with which this process ends.
        state: the state of Python's random generator, which the fork has replaced.
        mask: the numbers of the signals that this process blocks.
        threads: the largest number of threads for torch; None keeps torch's choice.
    """
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    random.setstate(state)
    if threads is not None:
        torch.set_num_threads(min(threads, torch.get_num_threads()))
        # The processes that the job starts read the variable.
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    pickle.dump(_outcome_of(run), file)
    file.flush()
    leave_process_group()


def _outcome_of(run: Callable[[], JobReturn]) -> _Outcome:
    """Runs the job and returns its outcome; a signal ends the process instead."""
    try:
        job_return = run()
    except (CarriedError, *user_error_types()) as error:
        return _Outcome(input_error=explain(error, "train"), trace=traceback.format_exc())
    except (SIGTERMException, Terminated):
        end_by_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        end_by_signal(signal.SIGINT)
    except SystemExit as error:
        return _Outcome(status=error.code)
    except Exception as error:
        return _Outcome(program_error=_describe(error), trace=traceback.format_exc())
    if job_return.status != JobStatus.FAILED:
        return _Outcome(job_return)
    # The error may be of a class that cannot be pickled.
    error, job_return.return_value = job_return._return_value, None
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return _Outcome(job_return, program_error=_describe(error), trace=trace)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
