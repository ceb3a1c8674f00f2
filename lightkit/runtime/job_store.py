"""Messages between the processes of a job: jobs, the result and errors, as JSON in a store of torch.distributed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightkit.errors import LightkitError

if TYPE_CHECKING:
    from torch.distributed import Store

# A process may wait this long for the next job: the present job of the leading process may take days.
_FOREVER = timedelta(days=365)

# The time within which the following processes read that there is no further job.
_LEAVE = timedelta(minutes=1)


@dataclass(frozen=True)
class ErrorReport:
    """The error that ended a process.

    Args:
        time: the time of the error, in seconds since the epoch.
        message: the message for the user.
        trace: the traceback of a fault of the program; empty for an error in the input.
    """

    time: float
    message: str
    trace: str


class JobStore:
    """The jobs that the leading process of a group publishes and the following processes take.

    Args:
        store: the store of torch.distributed that all processes of the group are connected to.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._jobs_taken = 0

    def publish(self, job: dict[str, Any] | None) -> None:
        """Publishes the next job for the following processes.

        Args:
            job: the job, which consists of JSON's types; None tells the processes that there is no further job.
        """
        self._store.set(f"job/{self._store.add('jobs', 1)}", json.dumps(job))

    def next_job(self) -> dict[str, Any] | None:
        """Waits until the leading process publishes the next job, for a year at most, and returns the job.

        Returns:
            The job; None if the leading process has published that there is no further job.

        Raises:
            RuntimeError: the connection to the store is lost.
        """
        self._jobs_taken += 1
        key = f"job/{self._jobs_taken}"
        self._store.wait([key], _FOREVER)
        return json.loads(self._store.get(key))

    def set_result(self, result: Any) -> None:
        """Publishes ``result``, the result of the job, which consists of JSON's types."""
        self._store.set("result", json.dumps(result))

    def result(self) -> Any:
        """Returns the result that the process of rank 0 has published; does not wait for it.

        Raises:
            LightkitError: the process of rank 0 has published no result.
        """
        if not self._store.check(["result"]):
            raise LightkitError("process 0 ended without a result")
        return json.loads(self._store.get("result"))

    def report_error(self, rank: int, message: str, trace: str = "") -> None:
        """Publishes the error that ends the process ``rank``; see `ErrorReport` for ``message`` and ``trace``."""
        self._store.set(f"error/{rank}", json.dumps(asdict(ErrorReport(time.time(), message, trace))))

    def errors(self, ranks: Iterable[int]) -> dict[int, ErrorReport]:
        """Returns the errors that processes among ``ranks`` have reported, by rank."""
        reported = [rank for rank in ranks if self._store.check([f"error/{rank}"])]
        return {rank: ErrorReport(**json.loads(self._store.get(f"error/{rank}"))) for rank in reported}

    def leave(self, rank: int) -> None:
        """Publishes that the process ``rank`` takes no further job."""
        self._store.set(f"left/{rank}", "")

    def wait_until_left(self, ranks: Iterable[int]) -> None:
        """Waits until all processes of ``ranks`` have called `leave`.

        Raises:
            RuntimeError: a process has not called `leave` after a minute.
        """
        self._store.wait([f"left/{rank}" for rank in ranks], _LEAVE)
