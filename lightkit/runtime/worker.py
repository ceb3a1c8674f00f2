"""This process among the processes of its job: it takes jobs, reports errors and leaves."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from lightkit.runtime.environment import is_started, is_under_torchrun, rank, world_size
from lightkit.runtime.rendezvous import Rendezvous


class Worker:
    """This process as one of a job's; it meets the others when it first has something to say or to ask."""

    def __init__(self) -> None:
        self._rendezvous: Rendezvous | None = None

    def _meet(self) -> Rendezvous:
        if self._rendezvous is None:
            self._rendezvous = Rendezvous()
        return self._rendezvous

    def publish(self, job: dict[str, Any]) -> None:
        """Gives a job to the processes that follow this one: see `follow`."""
        self._meet().jobs.publish(job)

    def follow(self, run: Callable[[dict[str, Any]], Any]) -> None:
        """Runs the jobs of the process that leads this one, as they come.

        Args:
            run: runs a job; the result in the process of rank 0 consists of JSON's types.
        """
        if rank() != 0:
            # One process speaks for all.
            sys.stdout = open(os.devnull, "w")
            warnings.simplefilter("ignore")
        if is_started():
            threading.Thread(target=_end_with_leader, daemon=True).start()
        jobs = self._meet().jobs
        while (job := jobs.next_job()) is not None:
            result = run(job)
            if is_started():
                if rank() == 0:
                    jobs.set_result(result)
                return
        jobs.leave(rank())

    def report_error(self, message: str, trace: str = "") -> None:
        """Reports the error that ends this process to the process that started it."""
        self._meet().jobs.report_error(rank(), message, trace)

    def finish(self) -> None:
        """Leaves the job; under torchrun the process of rank 0 tells the others first that there is no further job."""
        if is_under_torchrun() and not is_started() and rank() == 0:
            jobs = self._meet().jobs
            jobs.publish(None)
            # This process may be the server of the store: it stays until all have read that.
            jobs.wait_until_left(range(1, world_size()))
        if self._rendezvous is not None:
            self._rendezvous.release()
        leave_process_group()


def leave_process_group() -> None:
    """Destroys torch's process group, if there is one.

    Its threads must not outlive the interpreter, and Lightning destroys the group for NCCL alone.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def end_by_signal(number: signal.Signals) -> None:
    """Ends this process by a signal that it has caught, such that the process that started it sees the signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_at_once_in_group(status: int) -> None:
    """Ends this process if it is in a process group: an orderly end would wait for what the others no longer send."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with_leader() -> NoReturn:
    """Ends this process when the process that started it is gone, and with it the other end of the standard input."""
    # `os.read` takes no lock of Python's: one that this thread held would block the end of the interpreter.
    while os.read(0, 4096):
        pass
    os._exit(1)
