"""One job of a sweep in a process forked from this one: how it starts, and what is known of it in the end."""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, BinaryIO

import torch
from hydra.core.utils import JobReturn, JobStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightkit.app.messages import explain, user_errors
from lightkit.errors import CarriedError, LightkitError, Terminated
from lightkit.runtime.worker import end_by_signal, leave_process_group

# Of Linux's prctl.h.
_PR_SET_PDEATHSIG = 1


class JobError(RuntimeError):
    """A fault of the program in a job; its cause shows the traceback."""


class _JobTraceback(Exception):
    """Stands for an error in another process, whose traceback is its message."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Outcome:
    """What a job tells the process that it forked from.

    Args:
        job_return: Hydra's account of a job whose function came to its end, or failed by a fault of the program.
        refusal: the message of an error in the input.
        fault: the name and the message of a fault of the program.
        status: the argument of a `SystemExit`.
        trace: the traceback of whatever went wrong.
    """

    job_return: JobReturn | None = None
    refusal: str | None = None
    fault: str | None = None
    status: Any = None
    trace: str = ""


class JobProcess:
    """A job that runs in a process of its own.

    The process is in a session of its own, so that Ctrl-C at the terminal reaches its parent alone, who passes it on
    once. It ends when its parent does. Its standard input is empty, and functions registered by `atexit` are not
    called at its end before Python 3.13.

    Args:
        name: of the job, for messages.
        overrides: the words of the command line that are the job's own.
        run: does the job.
        mask: the signals that were blocked before the parent blocked those that it waits for.
        threads: that torch computes with at most; None for as many as it chooses.
    """

    def __init__(
        self,
        name: str,
        overrides: Sequence[str],
        run: Callable[[], JobReturn],
        mask: set[signal.Signals],
        threads: int | None,
    ) -> None:
        self._name = name
        self._overrides = list(overrides)
        # A file and no pipe, which would have to be read while the job runs.
        self._outcome = tempfile.TemporaryFile()
        # Python seeds the module's generator anew in a forked process.
        state = random.getstate()
        arguments = (run, self._outcome, os.getpid(), state, mask, threads)
        self._process = get_context("fork").Process(target=_run, args=arguments, name=name)
        self._process.start()

    def has_ended(self) -> bool:
        """Returns whether the process has."""
        return self._process.exitcode is not None

    def send(self, number: signal.Signals) -> None:
        """Sends the process a signal, if it is still there."""
        if not self.has_ended():
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends the process at once, and forgets it."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._outcome.close()

    def result(self) -> JobReturn:
        """Returns what Hydra knows of a job whose process has ended.

        A process that was killed or that crashed is a job that failed.

        Raises:
            CarriedError: an error in the input, which ends the sweep.
            JobError: a fault of the program outside of the job's own function.
            SystemExit: somebody has called `sys.exit` in the job.
        """
        status = self._process.exitcode
        self._process.close()
        with self._outcome as file:
            file.seek(0)
            content = file.read()
        if status != 0 or not content:
            job_return = JobReturn(self._overrides, status=JobStatus.FAILED)
            job_return.return_value = LightkitError(self._ending(status))
            return job_return
        outcome: _Outcome = pickle.loads(content)
        if outcome.refusal is not None:
            raise _caused(CarriedError(LightkitError(outcome.refusal)), outcome.trace)
        if outcome.fault is not None:
            error = _caused(JobError(f"{self._name}: {outcome.fault}"), outcome.trace)
            if outcome.job_return is None:
                raise error
            outcome.job_return.return_value = error
        elif outcome.job_return is None:
            raise SystemExit(outcome.status)
        return outcome.job_return

    def _ending(self, status: int) -> str:
        if status >= 0:
            return f"{self._name} ended with status {status} and no result"
        hint = "; the machine may be out of memory" if status == -signal.SIGKILL else ""
        return (
            f"{self._name} was ended by {signal.Signals(-status).name}{hint}. "
            "ckpt_path=last goes on with the sweep from the last checkpoint"
        )


def _caused(error: BaseException, trace: str) -> BaseException:
    error.__cause__ = _JobTraceback(trace)
    return error


def _run(
    run: Callable[[], JobReturn],
    file: BinaryIO,
    parent: int,
    state: tuple[Any, ...],
    mask: set[signal.Signals],
    threads: int | None,
) -> None:
    """Does the job in the forked process, and writes down what came of it."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    random.setstate(state)
    if threads is not None:
        torch.set_num_threads(min(threads, torch.get_num_threads()))
        # For what the job starts in turn.
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    pickle.dump(_outcome_of(run), file)
    file.flush()
    leave_process_group()


def _outcome_of(run: Callable[[], JobReturn]) -> _Outcome:
    try:
        job_return = run()
    except (CarriedError, *user_errors()) as error:
        return _Outcome(refusal=explain(error, "train"), trace=traceback.format_exc())
    except (SIGTERMException, Terminated):
        end_by_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        end_by_signal(signal.SIGINT)
    except SystemExit as error:
        return _Outcome(status=error.code)
    except Exception as error:
        return _Outcome(fault=_described(error), trace=traceback.format_exc())
    if job_return.status != JobStatus.FAILED:
        return _Outcome(job_return)
    # The error itself may be one that cannot be sent.
    error, job_return.return_value = job_return._return_value, None
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return _Outcome(job_return, fault=_described(error), trace=trace)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
