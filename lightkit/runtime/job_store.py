"""What the processes of a job tell each other: jobs, the result and errors, as JSON in a store of torch's."""

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

# Jobs may take their time.
_FOREVER = timedelta(days=365)

# The time within which the others read that there is no further job.
_LEAVE = timedelta(minutes=1)


@dataclass(frozen=True)
class ErrorReport:
    """The error that ended a process.

    Args:
        time: of the error, in seconds since the epoch.
        message: for the user.
        trace: the traceback of a fault of the program; empty for an error in the input.
    """

    time: float
    message: str
    trace: str


class JobStore:
    """The jobs of a group of processes, from the one that leads to those that follow.

    Args:
        store: connects all processes of the group.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._jobs_taken = 0

    def publish(self, job: dict[str, Any] | None) -> None:
        """Gives the next job to the processes that follow; None says that there is no further one."""
        self._store.set(f"job/{self._store.add('jobs', 1)}", json.dumps(job))

    def next_job(self) -> dict[str, Any] | None:
        """Waits for the next job that the leading process publishes, and returns it."""
        self._jobs_taken += 1
        key = f"job/{self._jobs_taken}"
        self._store.wait([key], _FOREVER)
        return json.loads(self._store.get(key))

    def set_result(self, result: Any) -> None:
        """Publishes the result of the job; it consists of JSON's types."""
        self._store.set("result", json.dumps(result))

    def result(self) -> Any:
        """Returns the result of the job.

        Raises:
            LightkitError: the process of rank 0 has ended without one.
        """
        if not self._store.check(["result"]):
            raise LightkitError("process 0 ended without a result")
        return json.loads(self._store.get("result"))

    def report_error(self, rank: int, message: str, trace: str = "") -> None:
        """Publishes the error that ends the process of that rank."""
        self._store.set(f"error/{rank}", json.dumps(asdict(ErrorReport(time.time(), message, trace))))

    def errors(self, ranks: Iterable[int]) -> dict[int, ErrorReport]:
        """Returns the errors that have been reported, by rank."""
        reported = [rank for rank in ranks if self._store.check([f"error/{rank}"])]
        return {rank: ErrorReport(**json.loads(self._store.get(f"error/{rank}"))) for rank in reported}

    def leave(self, rank: int) -> None:
        """Says that the process of that rank takes no further job."""
        self._store.set(f"left/{rank}", "")

    def wait_until_left(self, ranks: Iterable[int]) -> None:
        """Waits until the processes of those ranks have left."""
        self._store.wait([f"left/{rank}" for rank in ranks], _LEAVE)
