"""This process as one of the processes of its job: it takes jobs, reports errors and leaves."""

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
    """This process as one of the processes of a job; it connects to the others at the first call that needs them."""

    def __init__(self) -> None:
        self._rendezvous: Rendezvous | None = None

    def _meet(self) -> Rendezvous:
        if self._rendezvous is None:
            self._rendezvous = Rendezvous()
        return self._rendezvous

    def publish(self, job: dict[str, Any]) -> None:
        """Publishes ``job``, which consists of JSON's types, for the processes that run `follow`."""
        self._meet().jobs.publish(job)

    def follow(self, run: Callable[[dict[str, Any]], Any]) -> None:
        """Runs the jobs of the leading process: one job of a supervisor, or all jobs of rank 0 under torchrun.

        In processes of other ranks than 0 the method suppresses standard output and warnings.

        Args:
            run: a function that receives a job, runs it and returns the result. Under a supervisor the result in the
                process of rank 0 must consist of JSON's types.
        """
        if rank() != 0:
            # The process of rank 0 alone prints.
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
        """Reports the error that ends this process to the other processes: see `JobStore.report_error`."""
        self._meet().jobs.report_error(rank(), message, trace)

    def finish(self) -> None:
        """Leaves the job; under torchrun, rank 0 first tells the others that no job follows, and waits for them."""
        if is_under_torchrun() and not is_started() and rank() == 0:
            jobs = self._meet().jobs
            jobs.publish(None)
            # This process may be the server of the store, so that it waits until all have read the message.
            jobs.wait_until_left(range(1, world_size()))
        if self._rendezvous is not None:
            self._rendezvous.release()
        leave_process_group()


def leave_process_group() -> None:
    """Destroys torch's default process group, if there is one.

    The threads of the group must not outlive the interpreter, and Lightning destroys the group for NCCL alone.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def end_by_signal(number: signal.Signals) -> None:
    """Ends this process by the signal ``number``, so that its parent sees a death by that signal and no exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_at_once_in_group(status: int) -> None:
    """Ends this process at once with exit status ``status`` if torch's process group exists; else returns.

    An orderly end would wait for messages of processes that no longer send.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with_leader() -> NoReturn:
    """Ends this process after its parent has ended: reads standard input, a pipe from the parent, to the end."""
    # `os.read` takes no lock: a lock of ``sys.stdin`` in this thread would block the end of the interpreter.
    while os.read(0, 4096):
        pass
    os._exit(1)
